// The inner loops of low-rank updates with AVX2; empty where the compiler does not target it.
#include "../instruction_set.h"
#include "kernels.h"

namespace quantlab::adapters {

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

const UpdateKernel* avx2_updates() {
    static constexpr UpdateKernel kernel = Kernels<engine::Avx2Lanes>::table;
    return can_run(InstructionSet::avx2) ? &kernel : nullptr;
}

#else

const UpdateKernel* avx2_updates() { return nullptr; }

#endif

}  // namespace quantlab::adapters
