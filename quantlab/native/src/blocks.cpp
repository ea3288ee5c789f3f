// The table of block formats.
#include "blocks.h"

namespace quantlab {

namespace {

template <typename Block>
constexpr BlockFormat format(std::int32_t index, std::string_view name, std::int32_t fewest, std::int32_t most) {
    return {index, name, sizeof(Block), weights_in<Block>, Affine<Block> ? 2 : 1, fewest, most};
}

// The fewest levels leave a step to divide by: two codes, or for q8_0, whose codes lie around zero, three.
constexpr BlockFormat formats[format_count] = {
    format<BlockQ4_0>(0, "q4_0", 2, 16),
    format<BlockQ4_1>(1, "q4_1", 2, 16),
    format<BlockQ5_0>(2, "q5_0", 2, 32),
    format<BlockQ5_1>(3, "q5_1", 2, 32),
    format<BlockQ8_0>(4, "q8_0", 3, 255),
    {5, "tq2_0", sizeof(BlockTQ2_0), weights_in<BlockTQ2_0>, 0, 3, 3},
};

}  // namespace

std::span<const BlockFormat, format_count> block_formats() { return formats; }

const BlockFormat* find_block_format(std::string_view name) {
    for (const BlockFormat& format : formats) {
        if (format.name == name) {
            return &format;
        }
    }
    return nullptr;
}

}  // namespace quantlab
