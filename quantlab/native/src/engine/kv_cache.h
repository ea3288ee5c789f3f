// Keys and values of one layer and key head, as attention reads them.
//
// Keys: tiles of 16 positions; in a tile, per column, the 16 positions side by side, so that a lane is a position and a
// score needs no sum across lanes. Values: one position after the other, a lane is a column. In q8_0 a block of 32
// columns has one fp16 scale per position; a tile's block is 16 scales, then its 32 columns.
#pragma once

#include "decoder_spec.h"
#include "lanes.h"

#include <cstddef>
#include <cstdint>

namespace quantlab::engine {

inline constexpr int tile_positions = 16;
inline constexpr int cache_block = 32;

QUANTLAB_INLINE std::size_t key_tile_bytes(CacheType type, int head_size) {
    const auto columns = static_cast<std::size_t>(head_size) * tile_positions;
    switch (type) {
        case CacheType::f32: return columns * 4;
        case CacheType::f16: return columns * 2;
        case CacheType::q8_0: return columns + columns / cache_block * 2;
    }
    return 0;
}

QUANTLAB_INLINE std::size_t value_row_bytes(CacheType type, int head_size) {
    return key_tile_bytes(type, head_size) / tile_positions;
}

// Bytes of one layer's keys (or values) of one key head for `context` positions, in whole tiles.
QUANTLAB_INLINE std::size_t head_cache_bytes(CacheType type, int head_size, int context) {
    const auto tiles = static_cast<std::size_t>((context + tile_positions - 1) / tile_positions);
    return tiles * key_tile_bytes(type, head_size);
}

}  // namespace quantlab::engine
