// The specification of the multiplications.
#include "matmul_kernels.h"

namespace quantlab::engine {

const MatmulKernel& scalar_matmul_kernel() {
    static constexpr MatmulKernel kernel = MatmulKernelOf<ScalarLanes>::table();
    return kernel;
}

}  // namespace quantlab::engine
