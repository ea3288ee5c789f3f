// Writing keys and values to the cache and decoding them to floats, over a class of 16 lanes. Layout: kv_cache.h.
#pragma once

#include "kv_cache.h"
#include "lanes.h"
#include "matmul_tiles.h"
#include "packed_layout.h"
#include "quantize_token.h"

#include <cstring>

namespace quantlab::engine {

template <typename L>
struct CacheOver {
    static void store_key(CacheType type, std::uint8_t* keys, int position, const float* key, int head_size) {
        std::uint8_t* tile = keys + position / tile_positions * tile_bytes(type, head_size);
        const int lane = position % tile_positions;
        if (type == CacheType::f32) {
            auto* columns = reinterpret_cast<float*>(tile);
            for (int d = 0; d < head_size; ++d) columns[d * tile_positions + lane] = key[d];
        } else if (type == CacheType::f16) {
            auto* columns = reinterpret_cast<std::uint16_t*>(tile);
            alignas(64) std::uint16_t halves[16];
            for (int d = 0; d < head_size; d += 16) {
                L::load(key + d).store_half(halves);
                for (int i = 0; i < 16; ++i) columns[(d + i) * tile_positions + lane] = halves[i];
            }
        } else {
            for (int d = 0; d < head_size; d += cache_block, tile += tile_block_bytes) {
                std::int8_t codes[cache_block];
                store_scale(quantized(key + d, codes), tile, lane);
                std::uint8_t* columns = tile + KeyLayout::codes + 4 * lane;
                for (int i = 0; i < cache_block; i += 4) {
                    std::uint32_t four;
                    std::memcpy(&four, codes + i, sizeof four);
                    four ^= 0x80808080u;  // plus 128
                    std::memcpy(columns + 16 * i, &four, sizeof four);
                }
            }
        }
    }

    static void store_value(CacheType type, std::uint8_t* values, int position, const float* value, int head_size) {
        std::uint8_t* tile = values + position / tile_positions * tile_bytes(type, head_size);
        const int place = position % tile_positions;
        if (type == CacheType::f32) {
            std::memcpy(reinterpret_cast<float*>(tile) + place * head_size, value, sizeof(float) * static_cast<std::size_t>(head_size));
        } else if (type == CacheType::f16) {
            auto* row = reinterpret_cast<std::uint16_t*>(tile) + place * head_size;
            for (int d = 0; d < head_size; d += 16) L::load(value + d).store_half(row + d);
        } else {
            for (int d = 0; d < head_size; d += cache_block, tile += tile_block_bytes) {
                auto* codes = reinterpret_cast<std::int8_t*>(tile + tile_scale_bytes + place * cache_block);
                store_scale(quantized(value + d, codes), tile, place);
            }
        }
    }

    // A tile of keys as floats, [head_size][16 positions]: `tile` itself if it holds floats, else in `decoded`.
    template <CacheType type>
    static const float* keys(const std::uint8_t* tile, int head_size, float* decoded) {
        if constexpr (type == CacheType::f32) return reinterpret_cast<const float*>(tile);
        if constexpr (type == CacheType::f16) {
            const auto* columns = reinterpret_cast<const std::uint16_t*>(tile);
            for (int d = 0; d < head_size; ++d) {
                if (d % 2 == 0) ask_ahead(columns + d * tile_positions);
                L::load_half(columns + d * tile_positions).store(decoded + d * tile_positions);
            }
            return decoded;
        }
        float* out = decoded;
        for (int d = 0; d < head_size; d += cache_block, tile += tile_block_bytes) {
            const auto scaling = KeyBlock::scaling(tile);
            for (int chunk = 0; chunk < KeyLayout::chunks; ++chunk) {
                ask_ahead(tile + KeyLayout::codes + 64 * chunk);
                const auto codes = KeyBlock::codes(tile, chunk);
                QUANTLAB_UNROLL
                for (int i = 0; i < 4; ++i, out += tile_positions) KeyBlock::weight(L::column(codes, i), scaling).store(out);
            }
        }
        return decoded;
    }

    // A tile of values as floats, [16 positions][head_size], likewise. In q8_0 they lack their scales: see value_scales.
    template <CacheType type>
    static const float* values(const std::uint8_t* tile, int head_size, float* decoded) {
        if constexpr (type == CacheType::f32) return reinterpret_cast<const float*>(tile);
        if constexpr (type == CacheType::f16) {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(tile);
            for (int i = 0; i < tile_positions * head_size; i += 16) {
                if (i % 32 == 0) ask_ahead(halves + i);
                L::load_half(halves + i).store(decoded + i);
            }
            return decoded;
        }
        for (int d = 0; d < head_size; d += cache_block, tile += tile_block_bytes) {
            const auto* codes = reinterpret_cast<const std::int8_t*>(tile + tile_scale_bytes);
            float* out = decoded + d;
            for (int place = 0; place < tile_positions; ++place, codes += cache_block, out += head_size) {
                if (place % 2 == 0) ask_ahead(codes);
                L::load_int8(codes).store(out);
                L::load_int8(codes + 16).store(out + 16);
            }
        }
        return decoded;
    }

    // Of the positions of a q8_0 tile, for columns block * 32 to block * 32 + 31.
    static QUANTLAB_INLINE L value_scales(const std::uint8_t* tile, int block) {
        return L::load_half(reinterpret_cast<const std::uint16_t*>(tile + block * tile_block_bytes));
    }

private:
    using KeyLayout = BlockLayout<BlockQ8_0>;
    using KeyBlock = BlockLanes<L, KeyLayout>;
    static_assert(KeyLayout::bytes == tile_block_bytes && KeyLayout::codes == tile_scale_bytes && group_rows == tile_positions);

    // Asks for a line of a later tile. One at a time: asked for all at once, the lines of a tile hold up everything else.
    static QUANTLAB_INLINE void ask_ahead([[maybe_unused]] const void* line) {
#if defined(__GNUC__)
        __builtin_prefetch(static_cast<const char*>(line) + 4096);
#endif
    }

    // The codes of 32 columns and their scale, by the rule for activations (packed_matrix.h).
    static float quantized(const float* columns, std::int8_t* codes) {
        float scale, sum;
        QuantizeToken<L>::run(columns, cache_block, codes, &scale, &sum);
        return scale;
    }

    static void store_scale(float scale, std::uint8_t* tile, int place) {
        alignas(64) std::uint16_t halves[16];
        L::broadcast(scale).store_half(halves);
        std::memcpy(tile + 2 * place, halves, 2);
    }
};

}  // namespace quantlab::engine
