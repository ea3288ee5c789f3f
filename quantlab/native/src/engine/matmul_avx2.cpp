// The multiplications with AVX2, FMA and F16C. Compiled for it: nothing outside this file's kernel may be instantiated here.
#include "matmul_kernel.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "matmul_kernels.h"

namespace quantlab::engine {

const MatmulKernel* avx2_matmul_kernel() {
    static constexpr MatmulKernel kernel = MatmulKernelOf<Avx2Lanes>::table();
    return &kernel;
}

}  // namespace quantlab::engine

#else

namespace quantlab::engine {

const MatmulKernel* avx2_matmul_kernel() { return nullptr; }

}  // namespace quantlab::engine

#endif
