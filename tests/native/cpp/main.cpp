// Tests of the engine's linear algebra and threads, without Python. Ends with 0 if all hold.
#include "check.h"

int main() {
    test_lanes();
    test_matmul();
    test_thread_pool();
    std::printf("all hold\n");
}
