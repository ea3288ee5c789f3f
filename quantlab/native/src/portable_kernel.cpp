// The specification: conversion of rows to and from blocks, in portable loops a compiler can vectorize.
#include "code_bits.h"
#include "kernels.h"

#include <cmath>
#include <cstring>

namespace quantlab {

namespace {

// What an encoder works out before packing: a format-independent block.
struct Codes {
    float scale;
    float minimum;
    std::uint8_t codes[weights_per_block];
};

// Into 0..top; NaN gives 0. Clamping before converting to an integer keeps the conversion in range.
float clamped(float position, float top) {
    const float above_zero = position > 0.0f ? position : 0.0f;
    return above_zero < top ? above_zero : top;
}

std::int32_t truncated_code(float position, float top) { return static_cast<std::int32_t>(clamped(position, top)); }

Codes affine_codes(const float* weights, std::int32_t levels) {
    float minimum = weights[0];
    float maximum = weights[0];
    for (std::int32_t j = 1; j < weights_per_block; ++j) {
        minimum = weights[j] < minimum ? weights[j] : minimum;
        maximum = weights[j] > maximum ? weights[j] : maximum;
    }
    const float top = last_code(levels);
    Codes block{(maximum - minimum) / top, minimum, {}};
    const float inverse = inverse_or_zero(block.scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        block.codes[j] = static_cast<std::uint8_t>(truncated_code((weights[j] - minimum) * inverse + 0.5f, top));
    }
    return block;
}

// Bits of |weight|: they order as the magnitudes do, and integers let the maximum be taken in any order.
std::int32_t magnitude_bits(float weight) { return std::bit_cast<std::int32_t>(weight) & 0x7fffffff; }

std::int32_t largest_magnitude_bits(const float* weights) {
    std::int32_t largest = 0;
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        const std::int32_t bits = magnitude_bits(weights[j]);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// The weight of largest magnitude, with its sign; the first of several.
float extreme_weight(const float* weights) {
    const std::int32_t largest = largest_magnitude_bits(weights);
    std::int32_t j = 0;
    while (magnitude_bits(weights[j]) != largest) {
        ++j;
    }
    return weights[j];
}

Codes symmetric_codes(const float* weights, std::int32_t levels, std::int32_t zero_code) {
    const std::int32_t half = levels / 2;
    const float top = last_code(levels);
    Codes block{extreme_weight(weights) / static_cast<float>(-half), 0.0f, {}};
    const float offset = is_vanishing(block.scale) ? 0.0f : static_cast<float>(half) + 0.5f;
    const float inverse = inverse_or_zero(block.scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        const std::int32_t code = truncated_code(weights[j] * inverse + offset, top);
        block.codes[j] = static_cast<std::uint8_t>(code + zero_code - half);
    }
    return block;
}

// The 4- and 5-bit formats.
template <typename Block>
void encode(const float* weights, std::int32_t levels, Block& block) {
    Codes found;
    if constexpr (Affine<Block>) {
        found = affine_codes(weights, levels);
        block.minimum = half_from_float(found.minimum);
    } else {
        found = symmetric_codes(weights, levels, Block::zero_code);
    }
    block.scale = half_from_float(found.scale);
    if constexpr (HasHighBits<Block>) {
        pack_high_bits(found.codes, block.high_bits);
    }
    pack_nibbles(found.codes, block.nibbles);
}

template <typename Block>
void decode(const Block& block, float* weights) {
    std::uint8_t codes[weights_per_block];
    unpack_nibbles(block.nibbles, codes);
    if constexpr (HasHighBits<Block>) {
        add_high_bits(block.high_bits, codes);
    }
    const float step = float_from_half(block.scale);
    if constexpr (Affine<Block>) {
        const float start = float_from_half(block.minimum);
        for (std::int32_t j = 0; j < weights_per_block; ++j) {
            weights[j] = step * static_cast<float>(codes[j]) + start;
        }
    } else {
        for (std::int32_t j = 0; j < weights_per_block; ++j) {
            weights[j] = step * static_cast<float>(codes[j] - Block::zero_code);
        }
    }
}

// Rounded half away from zero.
std::int32_t rounded_code(float position, float top) {
    const float size = clamped(std::fabs(position), top);
    const auto whole = static_cast<std::int32_t>(size);
    const auto carry = static_cast<std::int32_t>(2.0f * (size - static_cast<float>(whole)));
    return static_cast<std::int32_t>(std::copysign(static_cast<float>(whole + carry), position));
}

template <>
void encode(const float* weights, std::int32_t levels, BlockQ8_0& block) {
    const float top = largest_signed_code(levels);
    const float scale = std::bit_cast<float>(largest_magnitude_bits(weights)) / top;
    const float inverse = inverse_or_zero(scale);
    block.scale = half_from_float(scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        block.codes[j] = static_cast<std::int8_t>(rounded_code(weights[j] * inverse, top));
    }
}

template <>
void decode(const BlockQ8_0& block, float* weights) {
    const float step = float_from_half(block.scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        weights[j] = static_cast<float>(block.codes[j]) * step;
    }
}

// Steps of -1 to 1; the code 3, which is never written, gives 2, as in gguf.
void decode(const BlockTQ2_0& block, float* weights) {
    const float step = float_from_half(block.scale);
    for (std::int32_t j = 0; j < weights_in<BlockTQ2_0>; ++j) {
        const std::uint8_t four = block.codes[32 * (j / 128) + j % 32];
        const std::int32_t code = (four >> (2 * (j / 32 % 4))) & 3;
        weights[j] = step * static_cast<float>(code - ternary_zero);
    }
}

void encode(const float* weights, float threshold, std::uint16_t scale, BlockTQ2_0& block) {
    bool is_zero = true;
    for (std::int32_t j = 0; j < weights_in<BlockTQ2_0>; ++j) {
        const std::int32_t step = (weights[j] > threshold ? 1 : 0) - (weights[j] < -threshold ? 1 : 0);
        is_zero = is_zero && step == 0;
        block.codes[32 * (j / 128) + j % 32] |= static_cast<std::uint8_t>((step + ternary_zero) << (2 * (j / 32 % 4)));
    }
    block.scale = is_zero ? std::uint16_t{0} : scale;
}

bool is_finite_half(std::uint16_t half) { return (half & half_infinity_bits) != half_infinity_bits; }

template <typename Block>
bool has_finite_header(const Block& block) {
    if constexpr (Affine<Block>) {
        return is_finite_half(block.scale) && is_finite_half(block.minimum);
    } else {
        return is_finite_half(block.scale);
    }
}

struct LaneSums {
    double squared_errors[sum_lanes] = {};
    double squared_weights[sum_lanes] = {};

    void add(const float* weights, const float* decoded, std::int32_t count) {
        for (std::int32_t j = 0; j < count; j += sum_lanes) {
            for (std::int32_t lane = 0; lane < sum_lanes; ++lane) {
                const double error = decoded[j + lane] - weights[j + lane];
                const double weight = weights[j + lane];
                squared_errors[lane] += error * error;
                squared_weights[lane] += weight * weight;
            }
        }
    }
};

struct PortableRows {
    template <typename Block, Element element>
    static bool quantize(const std::uint8_t* source, std::int64_t blocks, std::int32_t levels, std::uint8_t* bytes,
                         RowSums* sums) {
        LaneSums lanes;
        bool is_sound = true;
        for (std::int64_t i = 0; i < blocks; ++i) {
            float weights[weights_per_block];
            for (float& weight : weights) {
                weight = load_element<element>(source);
                source += element_bytes(element);
            }
            Block block{};
            if (static_cast<std::uint32_t>(largest_magnitude_bits(weights)) < infinity_bits) {
                encode(weights, levels, block);
            } else {
                block.scale = half_nan_bits;
            }
            is_sound = is_sound && has_finite_header(block);
            std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof block), &block, sizeof block);
            if (sums != nullptr) {
                float decoded[weights_per_block];
                decode(block, decoded);
                lanes.add(weights, decoded, weights_per_block);
            }
        }
        if (sums != nullptr) {
            *sums = {folded(lanes.squared_errors), folded(lanes.squared_weights)};
        }
        return is_sound;
    }

    template <Element element>
    static void sum_magnitudes(const std::uint8_t* source, std::int64_t blocks, double* sums) {
        constexpr std::int32_t count = weights_in<BlockTQ2_0>;
        for (std::int64_t i = 0; i < blocks; ++i) {
            double magnitudes[count];
            for (std::int32_t j = 0; j < count; ++j) {
                magnitudes[j] = std::fabs(load_element<element>(source + j * element_bytes(element)));
            }
            for (std::int32_t half = count / 2; half > 0; half /= 2) {
                for (std::int32_t j = 0; j < half; ++j) {
                    magnitudes[j] += magnitudes[j + half];
                }
            }
            sums[i] = magnitudes[0];
            source += count * element_bytes(element);
        }
    }

    template <Element element>
    static void quantize_ternary(const std::uint8_t* source, std::int64_t blocks, std::uint16_t scale,
                                 std::uint8_t* bytes, RowSums* sums) {
        const float threshold = ternary_threshold(scale);
        LaneSums lanes;
        for (std::int64_t i = 0; i < blocks; ++i) {
            float weights[weights_in<BlockTQ2_0>];
            for (float& weight : weights) {
                weight = load_element<element>(source);
                source += element_bytes(element);
            }
            BlockTQ2_0 block{};
            encode(weights, threshold, scale, block);
            std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof block), &block, sizeof block);
            if (sums != nullptr) {
                float decoded[weights_in<BlockTQ2_0>];
                decode(block, decoded);
                lanes.add(weights, decoded, weights_in<BlockTQ2_0>);
            }
        }
        if (sums != nullptr) {
            *sums = {folded(lanes.squared_errors), folded(lanes.squared_weights)};
        }
    }

    template <typename Block, Element element>
    static void dequantize(const std::uint8_t* bytes, std::int64_t blocks, std::uint8_t* target) {
        for (std::int64_t i = 0; i < blocks; ++i) {
            Block block;
            std::memcpy(&block, bytes + i * static_cast<std::int64_t>(sizeof block), sizeof block);
            float weights[weights_in<Block>];
            decode(block, weights);
            for (const float weight : weights) {
                store_element<element>(weight, target);
                target += element_bytes(element);
            }
        }
    }
};

constexpr Kernel kernel = KernelTable<PortableRows>::named("scalar");

}  // namespace

const Kernel& portable_kernel() { return kernel; }

}  // namespace quantlab
