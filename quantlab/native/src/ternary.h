// One scale a tensor and three codes: what every kernel shares of BlockTQ2_0.
//
// The scale gamma is the mean magnitude of a tensor's weights and a code the nearest of -1, 0 and 1 to weight / gamma,
// as BitNet b1.58 has it (Ma et al. 2024, arXiv 2402.17764). So that gamma does not depend on threads or vectors,
// magnitudes are added in double precision by halving: of a row of numbers whose length is a power of two the upper
// half is added to the lower until one is left. So are a block's 256, and so are the blocks' sums, in row-major order
// and filled up with zeros. The mean is rounded to fp32 and then to half precision.
//
// A block stores gamma, or 0 where all its codes stand for 0: what ggml's Python package gguf writes for the rounded
// weights.
#pragma once

#include "numbers.h"

#include <cstdint>
#include <limits>

namespace quantlab {

inline constexpr std::int32_t ternary_zero = 1;      // the code that stands for 0
inline constexpr std::uint8_t ternary_zeros = 0x55;  // four of it

// The magnitude that a weight of a code other than zero exceeds: RoundClip(weight / (scale + epsilon), -1, 1) without a
// division. epsilon, as in BitNet b1.58, keeps a tensor that is nearly zero from being scaled up.
inline float ternary_threshold(std::uint16_t scale) {
    constexpr float epsilon = 1e-5f;
    const float gamma = float_from_half(scale);
    return gamma > 0.0f ? 0.5f * (gamma + epsilon) : std::numeric_limits<float>::infinity();
}

}  // namespace quantlab
