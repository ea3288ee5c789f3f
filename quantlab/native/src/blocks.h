// ggml's five legacy block formats: 32 weights a block, min-max scales, codes rounded to nearest. And its TQ2_0: 256
// weights a block, three codes, and here one scale for a whole tensor (ternary.h).
//
// Source of the formats: ggml (https://github.com/ggml-org/ggml, src/ggml-common.h); the bytes equal those of its
// Python package gguf. All arithmetic is fp32, one rounding an operation: no contraction into fused multiply-adds, no
// flushing of subnormals, or codes on a tie and the last bit of decoded weights would differ between builds.
//
// A block with a weight that is NaN or infinite is written as scale NaN and zeros: it decodes to NaN wherever it goes.
#pragma once

#include <bit>
#include <cstdint>
#include <span>
#include <string_view>

namespace quantlab {

static_assert(std::endian::native == std::endian::little, "the blocks are little-endian on disk");

inline constexpr std::int32_t weights_per_block = 32;  // of the formats whose blocks have scales of their own

// Scales and minima are IEEE half-precision bits. In the 4- and 5-bit formats byte j of `nibbles` holds the low four
// bits of weight j (low nibble) and of weight j + 16 (high nibble); bit j of `high_bits`, read as a little-endian
// 32-bit number, is the fifth bit of weight j. `zero_code` is the stored code of weight zero: half the levels.
struct BlockQ4_0 {
    static constexpr std::int32_t zero_code = 8;
    std::uint16_t scale;
    std::uint8_t nibbles[16];
};

struct BlockQ4_1 {
    std::uint16_t scale;
    std::uint16_t minimum;
    std::uint8_t nibbles[16];
};

struct BlockQ5_0 {
    static constexpr std::int32_t zero_code = 16;
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

// 256 weights, scale * (code - 1) with codes of two bits: byte j of each half of `codes` holds weights j, j + 32, j + 64
// and j + 96 of that half's 128, the first in the lowest bits.
struct BlockTQ2_0 {
    std::uint8_t codes[64];
    std::uint16_t scale;
};

static_assert(sizeof(BlockQ4_0) == 18);
static_assert(sizeof(BlockQ4_1) == 20);
static_assert(sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ5_1) == 24);
static_assert(sizeof(BlockQ8_0) == 34);
static_assert(sizeof(BlockTQ2_0) == 66);

// The three ways a block stores its weights: scale * code + minimum, scale * (code - zero_code), scale * signed code.
template <typename Block>
concept Affine = requires(Block block) { block.minimum; };
template <typename Block>
concept Symmetric = requires { Block::zero_code; };
template <typename Block>
concept HasHighBits = requires(Block block) { block.high_bits; };

template <typename Block>
inline constexpr std::int32_t weights_in = weights_per_block;
template <>
inline constexpr std::int32_t weights_in<BlockTQ2_0> = 256;

// One format. `index` is its place in `block_formats`; `header_halves` counts the scale and, if any, the minimum that a
// block begins with, none in a format with one scale a tensor. `levels` in use may be fewest_levels to most_levels;
// most_levels is the format's own number.
struct BlockFormat {
    std::int32_t index;
    std::string_view name;
    std::int32_t block_bytes;
    std::int32_t block_weights;
    std::int32_t header_halves;
    std::int32_t fewest_levels;
    std::int32_t most_levels;

    bool has_own_scales() const { return header_halves > 0; }
};

inline constexpr std::int32_t format_count = 6;

std::span<const BlockFormat, format_count> block_formats();

// The format of that name (lower case, such as "q4_0"), or nullptr.
const BlockFormat* find_block_format(std::string_view name);

}  // namespace quantlab
