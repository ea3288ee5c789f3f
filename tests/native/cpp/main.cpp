// Tests of the conversions and the engine, without Python. Ends with 0 if all hold.
#include "check.h"

int main() {
    test_blocks();
    test_ternary();
    test_lanes();
    test_matmul();
    test_decoder();
    test_branches();
    test_sampler();
    test_thread_pool();
    test_updates();
    std::printf("all hold\n");
}
