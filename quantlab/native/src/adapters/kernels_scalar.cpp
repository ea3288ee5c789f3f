// The specification of the inner loops of low-rank updates, and the choice among their variants.
#include "../instruction_set.h"
#include "kernels.h"

namespace quantlab::adapters {

const UpdateKernel& scalar_updates() {
    static constexpr UpdateKernel kernel = Kernels<engine::ScalarLanes>::table;
    return kernel;
}

const UpdateKernel& chosen_updates() {
    const auto set = chosen_instruction_set();
    const bool is_wide = set && *set != InstructionSet::scalar && avx2_updates() != nullptr;
    return is_wide ? *avx2_updates() : scalar_updates();
}

}  // namespace quantlab::adapters
