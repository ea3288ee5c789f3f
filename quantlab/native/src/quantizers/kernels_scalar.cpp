// The specification of the quantizers' inner loops, and the choice among their variants.
#include "../instruction_set.h"
#include "kernels.h"

namespace quantlab::quantizers {

const QuantizerKernel& scalar_quantizers() {
    static constexpr QuantizerKernel kernel = Kernels<engine::ScalarLanes, ScalarDoubles>::table;
    return kernel;
}

const QuantizerKernel& chosen_quantizers() {
    const auto set = chosen_instruction_set();
    const bool is_wide = set && *set != InstructionSet::scalar && avx2_quantizers() != nullptr;
    return is_wide ? *avx2_quantizers() : scalar_quantizers();
}

}  // namespace quantlab::quantizers
