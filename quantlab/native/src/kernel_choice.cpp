// Which variant of the kernels runs: asked anew for every call, so that nothing is kept.
#include "kernels.h"

#include <cstdlib>

namespace quantlab {

const Kernel* chosen_kernel() {
    const char* forced = std::getenv(kernel_variable);
    const std::string_view wanted = forced == nullptr ? "" : forced;
    const Kernel* fastest = avx2_kernel() != nullptr ? avx2_kernel() : &portable_kernel();
    for (const Kernel* kernel : {fastest, &portable_kernel()}) {
        if (wanted.empty() || wanted == kernel->name) {
            return kernel;
        }
    }
    return nullptr;
}

}  // namespace quantlab
