// The multiplications with AVX2, FMA, F16C and AVX-VNNI. Compiled for it: nothing outside this file's kernel may be instantiated here.
#include "matmul_kernel.h"

#if defined(__AVXVNNI__)
#include "matmul_kernels.h"

namespace quantlab::engine {

const MatmulKernel* avx_vnni_matmul_kernel() {
    static constexpr MatmulKernel kernel = MatmulKernelOf<AvxVnniLanes>::table();
    return &kernel;
}

}  // namespace quantlab::engine

#else

namespace quantlab::engine {

const MatmulKernel* avx_vnni_matmul_kernel() { return nullptr; }

}  // namespace quantlab::engine

#endif
