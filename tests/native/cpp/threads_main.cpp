// What has threads, for ThreadSanitizer.
#include "check.h"

int main() {
    test_thread_pool();
    test_decoders_side_by_side();
    test_branches_of_threads();
    std::printf("all hold\n");
}
