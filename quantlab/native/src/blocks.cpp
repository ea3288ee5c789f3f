// Conversion of fp32 weights to and from ggml's legacy block formats, in portable loops a compiler can vectorize.
#include "blocks.h"

#include <cmath>
#include <cstring>

namespace quantlab {

std::uint16_t half_from_float(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {  // NaN: made quiet
        half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 is half-way from the largest half to the next power of two
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14, where halves are 2^-24 apart, as floats from 0.5 to 1 are
        half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {  // round the 13 dropped bits to even, then move the exponent's bias from 127 to 15
        half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return static_cast<std::uint16_t>(sign | half);
}

float float_from_half(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    std::uint32_t bits;
    if (magnitude >= 0x0f800000u) {  // infinity and NaN
        bits = magnitude | 0x7f800000u;
    } else if (magnitude < 0x00800000u) {  // subnormal: its mantissa counts steps of 2^-24
        bits = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude >> 13) * 0x1p-24f);
    } else {
        bits = magnitude + 0x38000000u;
    }
    return std::bit_cast<float>(sign | bits);
}

namespace {

// What an encoder works out before packing: a format-independent block.
struct Codes {
    float scale;
    float minimum;
    std::uint8_t codes[weights_per_block];
};

// A scale so small that its inverse is beyond fp32 is zero in half precision: all codes of its block are 0, which is
// also what ggml's and numpy's conversions of infinity and NaN to a code give on x86.
bool is_vanishing(float scale) { return scale != 0.0f && std::isinf(1.0f / scale); }

float inverse_or_zero(float scale) { return scale == 0.0f || is_vanishing(scale) ? 0.0f : 1.0f / scale; }

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
    const float top = static_cast<float>(levels - 1);
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

// `zero_code` is the stored code of zero: half the format's own number of levels.
Codes symmetric_codes(const float* weights, std::int32_t levels, std::int32_t zero_code) {
    const std::int32_t half = levels / 2;
    const float top = static_cast<float>(levels - 1);
    Codes block{extreme_weight(weights) / static_cast<float>(-half), 0.0f, {}};
    const float offset = is_vanishing(block.scale) ? 0.0f : static_cast<float>(half) + 0.5f;
    const float inverse = inverse_or_zero(block.scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        const std::int32_t code = truncated_code(weights[j] * inverse + offset, top);
        block.codes[j] = static_cast<std::uint8_t>(code + zero_code - half);
    }
    return block;
}

void pack_nibbles(const std::uint8_t* codes, std::uint8_t* nibbles) {
    for (std::int32_t j = 0; j < 16; ++j) {
        nibbles[j] = static_cast<std::uint8_t>((codes[j] & 0x0f) | (codes[j + 16] << 4));
    }
}

void unpack_nibbles(const std::uint8_t* nibbles, std::uint8_t* codes) {
    for (std::int32_t j = 0; j < 16; ++j) {
        codes[j] = nibbles[j] & 0x0f;
        codes[j + 16] = nibbles[j] >> 4;
    }
}

// Eight codes at a time as the bytes of one number: the product moves the lowest bit of byte j to bit 56 + j.
void pack_high_bits(const std::uint8_t* codes, std::uint8_t* high_bits) {
    for (std::int32_t byte = 0; byte < 4; ++byte) {
        std::uint64_t eight;
        std::memcpy(&eight, codes + 8 * byte, 8);
        const std::uint64_t lowest = (eight >> 4) & 0x0101010101010101u;
        high_bits[byte] = static_cast<std::uint8_t>((lowest * 0x0102040810204080u) >> 56);
    }
}

// The product copies the byte eight times, the mask keeps bit j of copy j, and the sum carries it to the copy's top.
void add_high_bits(const std::uint8_t* high_bits, std::uint8_t* codes) {
    for (std::int32_t byte = 0; byte < 4; ++byte) {
        const std::uint64_t kept = (high_bits[byte] * 0x0101010101010101u) & 0x8040201008040201u;
        const std::uint64_t lowest = ((kept + 0x7f7f7f7f7f7f7f7fu) >> 7) & 0x0101010101010101u;
        std::uint64_t eight;
        std::memcpy(&eight, codes + 8 * byte, 8);
        eight |= lowest << 4;
        std::memcpy(codes + 8 * byte, &eight, 8);
    }
}

void decode_affine(const std::uint8_t* codes, std::uint16_t scale, std::uint16_t minimum, float* weights) {
    const float step = float_from_half(scale);
    const float start = float_from_half(minimum);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        weights[j] = step * static_cast<float>(codes[j]) + start;
    }
}

void decode_symmetric(const std::uint8_t* codes, std::uint16_t scale, std::int32_t zero_code, float* weights) {
    const float step = float_from_half(scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        weights[j] = step * static_cast<float>(codes[j] - zero_code);
    }
}

void encode(const float* weights, std::int32_t levels, BlockQ4_0& block) {
    const Codes found = symmetric_codes(weights, levels, 8);
    block.scale = half_from_float(found.scale);
    pack_nibbles(found.codes, block.nibbles);
}

void decode(const BlockQ4_0& block, float* weights) {
    std::uint8_t codes[weights_per_block];
    unpack_nibbles(block.nibbles, codes);
    decode_symmetric(codes, block.scale, 8, weights);
}

void encode(const float* weights, std::int32_t levels, BlockQ4_1& block) {
    const Codes found = affine_codes(weights, levels);
    block.scale = half_from_float(found.scale);
    block.minimum = half_from_float(found.minimum);
    pack_nibbles(found.codes, block.nibbles);
}

void decode(const BlockQ4_1& block, float* weights) {
    std::uint8_t codes[weights_per_block];
    unpack_nibbles(block.nibbles, codes);
    decode_affine(codes, block.scale, block.minimum, weights);
}

void encode(const float* weights, std::int32_t levels, BlockQ5_0& block) {
    const Codes found = symmetric_codes(weights, levels, 16);
    block.scale = half_from_float(found.scale);
    pack_high_bits(found.codes, block.high_bits);
    pack_nibbles(found.codes, block.nibbles);
}

void decode(const BlockQ5_0& block, float* weights) {
    std::uint8_t codes[weights_per_block];
    unpack_nibbles(block.nibbles, codes);
    add_high_bits(block.high_bits, codes);
    decode_symmetric(codes, block.scale, 16, weights);
}

void encode(const float* weights, std::int32_t levels, BlockQ5_1& block) {
    const Codes found = affine_codes(weights, levels);
    block.scale = half_from_float(found.scale);
    block.minimum = half_from_float(found.minimum);
    pack_high_bits(found.codes, block.high_bits);
    pack_nibbles(found.codes, block.nibbles);
}

void decode(const BlockQ5_1& block, float* weights) {
    std::uint8_t codes[weights_per_block];
    unpack_nibbles(block.nibbles, codes);
    add_high_bits(block.high_bits, codes);
    decode_affine(codes, block.scale, block.minimum, weights);
}

// Rounded half away from zero.
std::int32_t rounded_code(float position, float top) {
    const float size = clamped(std::fabs(position), top);
    const auto whole = static_cast<std::int32_t>(size);
    const auto carry = static_cast<std::int32_t>(2.0f * (size - static_cast<float>(whole)));
    return static_cast<std::int32_t>(std::copysign(static_cast<float>(whole + carry), position));
}

void encode(const float* weights, std::int32_t levels, BlockQ8_0& block) {
    const float top = static_cast<float>((levels - 1) / 2);
    const float scale = std::bit_cast<float>(largest_magnitude_bits(weights)) / top;
    const float inverse = inverse_or_zero(scale);
    block.scale = half_from_float(scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        block.codes[j] = static_cast<std::int8_t>(rounded_code(weights[j] * inverse, top));
    }
}

void decode(const BlockQ8_0& block, float* weights) {
    const float step = float_from_half(block.scale);
    for (std::int32_t j = 0; j < weights_per_block; ++j) {
        weights[j] = static_cast<float>(block.codes[j]) * step;
    }
}

// Blocks go through a local copy because rows of bytes, such as a mapped file's, need not be aligned.
template <typename Block>
void quantize(const float* weights, std::int64_t blocks, std::int32_t levels, std::uint8_t* bytes) {
    for (std::int64_t i = 0; i < blocks; ++i) {
        Block block;
        encode(weights + i * weights_per_block, levels, block);
        std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof(Block)), &block, sizeof(Block));
    }
}

template <typename Block>
void dequantize(const std::uint8_t* bytes, std::int64_t blocks, float* weights) {
    for (std::int64_t i = 0; i < blocks; ++i) {
        Block block;
        std::memcpy(&block, bytes + i * static_cast<std::int64_t>(sizeof(Block)), sizeof(Block));
        decode(block, weights + i * weights_per_block);
    }
}

template <typename Block>
constexpr BlockFormat format(std::string_view name, std::int32_t fewest_levels, std::int32_t most_levels) {
    constexpr auto block_bytes = static_cast<std::int32_t>(sizeof(Block));
    return {name, block_bytes, fewest_levels, most_levels, quantize<Block>, dequantize<Block>};
}

// The fewest levels leave a step to divide by: two codes, or for q8_0, whose codes lie around zero, three.
constexpr BlockFormat formats[] = {
    format<BlockQ4_0>("q4_0", 2, 16),
    format<BlockQ4_1>("q4_1", 2, 16),
    format<BlockQ5_0>("q5_0", 2, 32),
    format<BlockQ5_1>("q5_1", 2, 32),
    format<BlockQ8_0>("q8_0", 3, 255),
};

}  // namespace

std::span<const BlockFormat> block_formats() { return formats; }

const BlockFormat* find_block_format(std::string_view name) {
    for (const BlockFormat& format : formats) {
        if (format.name == name) {
            return &format;
        }
    }
    return nullptr;
}

}  // namespace quantlab
