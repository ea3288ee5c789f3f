// The quantizers' inner loops with AVX2, FMA and F16C; empty where the compiler does not target them.
#include "../instruction_set.h"
#include "kernels.h"

namespace quantlab::quantizers {

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

const QuantizerKernel* avx2_quantizers() {
    static constexpr QuantizerKernel kernel = Kernels<engine::Avx2Lanes, Avx2Doubles>::table;
    return can_run(InstructionSet::avx2) ? &kernel : nullptr;
}

#else

const QuantizerKernel* avx2_quantizers() { return nullptr; }

#endif

}  // namespace quantlab::quantizers
