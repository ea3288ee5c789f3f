// The multiplications with AVX-512 F, BW, VL and VNNI. Compiled for it: nothing outside this file's kernel may be instantiated here.
#include "matmul_kernel.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include "matmul_kernels.h"

namespace quantlab::engine {

const MatmulKernel* avx512_matmul_kernel() {
    static constexpr MatmulKernel kernel = MatmulKernelOf<Avx512Lanes>::table();
    return &kernel;
}

}  // namespace quantlab::engine

#else

namespace quantlab::engine {

const MatmulKernel* avx512_matmul_kernel() { return nullptr; }

}  // namespace quantlab::engine

#endif
