// What has threads, for ThreadSanitizer.
#include "check.h"

int main() {
    test_thread_pool();
    test_decoders_side_by_side();
    std::printf("all hold\n");
}
