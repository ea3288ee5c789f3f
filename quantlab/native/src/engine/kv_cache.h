// Keys and values of one layer and key head, as attention reads them: tiles of 16 positions.
//
// In a tile of keys the 16 positions lie side by side, column after column, so that a lane is a position and a score
// needs no sum across lanes. In a tile of values the columns lie side by side, position after position. In q8_0 a tile
// goes by blocks of 32 columns, each 16 scales in fp16 and then its codes: of values in that same order, of keys as
// packed_layout.h has them, so that the keys are a packed matrix whose rows are positions.
#pragma once

#include "decoder_spec.h"
#include "lanes.h"

#include <cstddef>
#include <cstdint>

namespace quantlab::engine {

inline constexpr int tile_positions = 16;
inline constexpr int cache_block = 32;

inline constexpr int tile_scale_bytes = 2 * tile_positions;
inline constexpr int tile_block_bytes = tile_scale_bytes + cache_block * tile_positions;

QUANTLAB_INLINE std::size_t tile_bytes(CacheType type, int head_size) {
    const auto columns = static_cast<std::size_t>(head_size) * tile_positions;
    switch (type) {
        case CacheType::f32: return columns * 4;
        case CacheType::f16: return columns * 2;
        case CacheType::q8_0: return static_cast<std::size_t>(head_size / cache_block) * tile_block_bytes;
    }
    return 0;
}

// Bytes of one layer's keys (or values) of one key head for `context` positions, in whole tiles.
QUANTLAB_INLINE std::size_t head_cache_bytes(CacheType type, int head_size, int context) {
    const auto tiles = static_cast<std::size_t>((context + tile_positions - 1) / tile_positions);
    return tiles * tile_bytes(type, head_size);
}

}  // namespace quantlab::engine
