// Which variant of the conversions runs: asked anew for every call, so that nothing is kept.
#include "instruction_set.h"
#include "kernels.h"

#include <optional>

namespace quantlab {

const Kernel* chosen_kernel() {
    const std::optional<InstructionSet> chosen = chosen_instruction_set();
    if (!chosen) {
        return nullptr;
    }
    return *chosen >= InstructionSet::avx2 && avx2_kernel() != nullptr ? avx2_kernel() : &portable_kernel();
}

}  // namespace quantlab
