// Which instruction set the kernels use: the processor's best, or the one an environment variable forces.
#pragma once

#include <optional>
#include <string_view>

namespace quantlab {

// In ascending order: a processor that can run one can run those before it. avx2 stands for AVX2, FMA and F16C, avx512
// for AVX-512 F, BW, VL and VNNI besides.
enum class InstructionSet : int { scalar, avx2, avx512 };

inline constexpr std::string_view instruction_set_names[] = {"scalar", "avx2", "avx512"};

constexpr std::string_view name_of(InstructionSet set) { return instruction_set_names[static_cast<int>(set)]; }

// The environment variable that forces one, by name.
inline constexpr const char* kernel_variable = "QUANTLAB_CPU_KERNEL";

// Whether this processor and this build have it.
bool can_run(InstructionSet set);

// Whether the processor has AVX-VNNI, byte products for vectors of 256 bits, as some without AVX-512 do.
bool has_avx_vnni();

// The best that can run here, or the forced one; nothing if that is unknown or cannot run here. The variable is read
// anew by every call.
std::optional<InstructionSet> chosen_instruction_set();

}  // namespace quantlab
