// ggml's five legacy block formats: 32 weights a block, min-max scales, codes rounded to nearest.
//
// Source of the formats: ggml (https://github.com/ggml-org/ggml, src/ggml-common.h); the bytes equal those of its
// Python package gguf. All arithmetic is fp32, one rounding an operation: no contraction into fused multiply-adds, no
// flushing of subnormals, or codes on a tie and the last bit of decoded weights would differ between builds.
//
// Weights are expected to be finite. NaN and infinity are safe (no undefined behaviour) but what they encode to is
// not promised.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <string_view>

namespace quantlab {

static_assert(std::endian::native == std::endian::little, "the blocks are little-endian on disk");

inline constexpr std::int32_t weights_per_block = 32;

// Scales and minima are IEEE half-precision bits. In the 4- and 5-bit formats byte j of `nibbles` holds the low four
// bits of weight j (low nibble) and of weight j + 16 (high nibble); bit j of `high_bits`, read as a little-endian
// 32-bit number, is the fifth bit of weight j.
struct BlockQ4_0 {
    std::uint16_t scale;
    std::uint8_t nibbles[16];
};

struct BlockQ4_1 {
    std::uint16_t scale;
    std::uint16_t minimum;
    std::uint8_t nibbles[16];
};

struct BlockQ5_0 {
    std::uint16_t scale;
    std::uint8_t high_bits[4];
    std::uint8_t nibbles[16];
};

struct BlockQ5_1 {
    std::uint16_t scale;
    std::uint16_t minimum;
    std::uint8_t high_bits[4];
    std::uint8_t nibbles[16];
};

struct BlockQ8_0 {
    std::uint16_t scale;
    std::int8_t codes[32];
};

static_assert(sizeof(BlockQ4_0) == 18);
static_assert(sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34);

// One format: its sizes and its two conversions over `blocks` consecutive blocks, at any alignment of the bytes.
// `levels` is the number of codes in use, fewest_levels to most_levels; most_levels is the format's own.
struct BlockFormat {
    std::string_view name;
    std::int32_t block_bytes;
    std::int32_t fewest_levels;
    std::int32_t most_levels;
    void (*quantize)(const float* weights, std::int64_t blocks, std::int32_t levels, std::uint8_t* bytes);
    void (*dequantize)(const std::uint8_t* bytes, std::int64_t blocks, float* weights);
};

std::span<const BlockFormat> block_formats();

// The format of that name (lower case, such as "q4_0"), or nullptr.
const BlockFormat* find_block_format(std::string_view name);

// Nearest half-precision number, ties to even; beyond the largest, infinity.
std::uint16_t half_from_float(float value);

float float_from_half(std::uint16_t half);

}  // namespace quantlab
