// Blocks taken apart into scales and signed codes, and put together again.
//
// In here a weight is step * code + offset in every format: codes count from the format's zero (8 for q4_0, 16 for
// q5_0), and offset is 0 where a block has no minimum.
#pragma once

#include "../blocks.h"
#include "../code_bits.h"
#include "../numbers.h"

#include <cstdint>
#include <cstring>

namespace quantlab::quantizers {

inline constexpr int block_columns = weights_per_block;

// The codes in use, counted from the format's zero.
struct CodeRange {
    float least;
    float most;
    bool has_offset;
};

// Half-precision bits of step and offset, and the codes.
struct OpenBlock {
    std::uint16_t step;
    std::uint16_t offset;
    std::int8_t codes[block_columns];
};

template <typename Block>
CodeRange code_range(std::int32_t levels) {
    if constexpr (Affine<Block>) {
        return {0.0f, last_code(levels), true};
    } else if constexpr (Symmetric<Block>) {
        const std::int32_t middle = levels / 2;
        return {static_cast<float>(-middle), static_cast<float>(levels - 1 - middle), false};
    } else {
        return {-largest_signed_code(levels), largest_signed_code(levels), false};
    }
}

template <typename Block>
constexpr std::int32_t stored_zero() {
    if constexpr (Symmetric<Block>) {
        return Block::zero_code;
    } else {
        return 0;
    }
}

template <typename Block>
void close_block(const OpenBlock& open, std::uint8_t* bytes) {
    Block block = {};
    block.scale = open.step;
    if constexpr (Affine<Block>) {
        block.minimum = open.offset;
    }
    if constexpr (!Affine<Block> && !Symmetric<Block>) {
        std::memcpy(block.codes, open.codes, sizeof block.codes);
    } else {
        std::uint8_t codes[block_columns];
        for (int j = 0; j < block_columns; ++j) {
            codes[j] = static_cast<std::uint8_t>(open.codes[j] + stored_zero<Block>());
        }
        pack_nibbles(codes, block.nibbles);
        if constexpr (HasHighBits<Block>) {
            pack_high_bits(codes, block.high_bits);
        }
    }
    std::memcpy(bytes, &block, sizeof block);
}

template <typename Block>
OpenBlock open_block(const std::uint8_t* bytes) {
    Block block;
    std::memcpy(&block, bytes, sizeof block);
    OpenBlock open = {block.scale, 0, {}};
    if constexpr (Affine<Block>) {
        open.offset = block.minimum;
    }
    if constexpr (!Affine<Block> && !Symmetric<Block>) {
        std::memcpy(open.codes, block.codes, sizeof open.codes);
    } else {
        std::uint8_t codes[block_columns];
        unpack_nibbles(block.nibbles, codes);
        if constexpr (HasHighBits<Block>) {
            add_high_bits(block.high_bits, codes);
        }
        for (int j = 0; j < block_columns; ++j) {
            open.codes[j] = static_cast<std::int8_t>(codes[j] - stored_zero<Block>());
        }
    }
    return open;
}

// What a format's blocks are to a quantizer.
struct BlockAccess {
    CodeRange (*range)(std::int32_t levels);
    void (*close)(const OpenBlock& open, std::uint8_t* bytes);
    OpenBlock (*open)(const std::uint8_t* bytes);
};

template <typename Block>
inline constexpr BlockAccess access_of{code_range<Block>, close_block<Block>, open_block<Block>};

// In the order of block_formats(); null for a format with one scale a tensor.
inline constexpr BlockAccess block_access[format_count] = {access_of<BlockQ4_0>, access_of<BlockQ4_1>,
                                                           access_of<BlockQ5_0>, access_of<BlockQ5_1>,
                                                           access_of<BlockQ8_0>};

}  // namespace quantlab::quantizers
