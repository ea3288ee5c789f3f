// The pool alone, for ThreadSanitizer.
#include "check.h"

int main() {
    test_thread_pool();
    std::printf("all hold\n");
}
