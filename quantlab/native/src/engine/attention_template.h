// Attention of queries that share a key head, over a class of 16 lanes: see AttentionTask.
//
// Keys and values are decoded to floats a tile at a time, once for all queries; a lane of keys is a position, a lane of
// values a column. (Keys in q8_0 are not, where queries are int8 too: the products are there already.) A query's numbers depend on its own range of positions alone, not on its company.
#pragma once

#include "decoder_ops.h"
#include "kv_cache_template.h"
#include "lane_math.h"
#include "lanes.h"
#include "matmul_tiles.h"

#include <cstddef>
#include <limits>

namespace quantlab::engine {

template <typename L>
struct AttentionOver {
    static void attend_chunk(CacheType type, const AttentionTask& task, int chunk, const AttentionState& state) {
        switch (type) {
            case CacheType::f32: return attend_in<CacheType::f32>(task, chunk, state);
            case CacheType::f16: return attend_in<CacheType::f16>(task, chunk, state);
            case CacheType::q8_0: return attend_in<CacheType::q8_0>(task, chunk, state);
        }
    }

    static void merge(const AttentionState& into, const AttentionState& later, int count, int head_size) {
        for (int q = 0; q < count; ++q) {
            if (later.largest[q] == lowest) continue;
            float* values = into.values + static_cast<std::ptrdiff_t>(q) * head_size;
            const float* added = later.values + static_cast<std::ptrdiff_t>(q) * head_size;
            if (into.largest[q] == lowest) {
                into.largest[q] = later.largest[q];
                into.sums[q] = later.sums[q];
                for (int d = 0; d < head_size; d += 16) L::load(added + d).store(values + d);
                continue;
            }
            const float largest = into.largest[q] > later.largest[q] ? into.largest[q] : later.largest[q];
            const float factor = exp_of(into.largest[q] - largest), other = exp_of(later.largest[q] - largest);
            const L old_factor = L::broadcast(factor), new_factor = L::broadcast(other);
            for (int d = 0; d < head_size; d += 16) {
                L::fma(L::load(added + d), new_factor, L::load(values + d) * old_factor).store(values + d);
            }
            into.sums[q] = into.sums[q] * factor + later.sums[q] * other;
            into.largest[q] = largest;
        }
    }

    static void finish(const AttentionState& state, int count, int head_size, float* const* out) {
        for (int q = 0; q < count; ++q) {
            const L inverse = L::broadcast(1.0f / state.sums[q]);
            const float* values = state.values + static_cast<std::ptrdiff_t>(q) * head_size;
            for (int d = 0; d < head_size; d += 16) (L::load(values + d) * inverse).store(out[q] + d);
        }
    }

private:
    static constexpr float lowest = -std::numeric_limits<float>::infinity();

    struct Range {  // of positions, the last included
        int first, last;
        bool empty() const { return first > last; }
    };

    struct Queries {
        int first, count;
    };

    static int lower(int a, int b) { return a < b ? a : b; }
    static int higher(int a, int b) { return a > b ? a : b; }
    static Range common(Range a, Range b) { return {higher(a.first, b.first), lower(a.last, b.last)}; }

    static void fill(float* values, std::ptrdiff_t count, float value) {
        for (std::ptrdiff_t i = 0; i < count; ++i) values[i] = value;
    }

    static float exp_of(float x) {
        alignas(64) float lanes[16];
        lane_exp(L::broadcast(x)).store(lanes);
        return lanes[0];
    }

    static Range seen(const AttentionTask& task, int q, Range part) {
        return common({task.first[q], task.last[q]}, part);
    }

    template <CacheType type>
    static void attend_in(const AttentionTask& task, int chunk, const AttentionState& state) {
        const int start = chunk * attention_chunk;
        const Range all{start, start + attention_chunk - 1};
        Range some{all.last, all.first - 1};  // what any of the queries sees
        for (int q = 0; q < task.count; ++q) {
            const Range own = seen(task, q, all);
            if (own.empty()) continue;
            some = {lower(some.first, own.first), higher(some.last, own.last)};
        }
        fill(state.values, static_cast<std::ptrdiff_t>(task.count) * task.head_size, 0.0f);
        if (task.multiplied) scale_products(task, {some.first - start, some.last - start});
        for (int at = some.first / tile_positions * tile_positions; at <= some.last && !task.multiplied; at += tile_positions) {
            for_each_reader<type>(task, at / tile_positions, [&](const CacheTiles& tile, Queries readers) {
                const float* keys = CacheOver<L>::template keys<type>(tile.keys, task.head_size, task.decoded);
                for_each_tile<L::value_tile>(readers.count, [&]<int count>(int i) {
                    const int q = readers.first + i;
                    score<count>(task, keys, q, task.scores + q * attention_chunk + (at - start));
                });
            });
        }
        for (int q = 0; q < task.count; ++q) {
            const Range own = seen(task, q, all);
            state.largest[q] = lowest;
            if (!own.empty()) soften(task.scores + q * attention_chunk, start, own, state.largest[q], state.sums[q]);
        }
        for (int at = some.first / tile_positions * tile_positions; at <= some.last; at += tile_positions) {
            for_each_reader<type>(task, at / tile_positions, [&](const CacheTiles& tile, Queries readers) {
                add_values<type>(task, tile.values, {at, at + tile_positions - 1}, at - start, readers, state);
            });
        }
    }

    // Calls work(tile, queries) for queries that read the same keys and values at the positions of a tile.
    template <CacheType type, typename Work>
    static QUANTLAB_INLINE void for_each_reader(const AttentionTask& task, int tile, const Work& work) {
        const auto place = [&](const CacheTiles& tiles, int index) {
            const std::size_t offset = static_cast<std::size_t>(index) * tile_bytes(type, task.head_size);
            return CacheTiles{tiles.keys + offset, tiles.values + offset};
        };
        if (tile < task.shared_tiles) return work(place(task.shared, tile), Queries{0, task.count});
        for (int q = 0; q < task.count; q += task.own_queries) {
            work(place(task.own[q / task.own_queries], tile - task.shared_tiles), Queries{q, task.own_queries});
        }
    }

    // Adds a tile's values, weighted with the numbers that lie at `place` in the rows of scores.
    template <CacheType type>
    static QUANTLAB_INLINE void add_values(const AttentionTask& task, const std::uint8_t* tile, Range positions, int place,
                                           Queries readers, const AttentionState& state) {
        const float* values = CacheOver<L>::template values<type>(tile, task.head_size, task.decoded);
        if constexpr (type != CacheType::q8_0) {
            const Weights weights{task.scores + place, attention_chunk};
            add_columns(task, values, weights, positions, {0, task.head_size - 1}, readers, state);
        } else {
            for (int block = 0; block < task.head_size / cache_block; ++block) {
                const L scales = CacheOver<L>::value_scales(tile, block);
                for (int q = readers.first; q < readers.first + readers.count; ++q) {
                    (L::load(task.scores + q * attention_chunk + place) * scales).store(task.folded + q * tile_positions);
                }
                const Range columns{block * cache_block, (block + 1) * cache_block - 1};
                add_columns(task, values, {task.folded, tile_positions}, positions, columns, readers, state);
            }
        }
    }

    // In place: products of queries and keys -> scores.
    static void scale_products(const AttentionTask& task, Range places) {
        const L scale = L::broadcast(task.scale);
        for (int q = 0; q < task.count; ++q) {
            float* row = task.scores + q * attention_chunk;
            for (int i = places.first / 16 * 16; i <= places.last; i += 16) {
                L scores = L::load(row + i) * scale;
                if (task.cap != 0.0f) scores = lane_soft_cap(scores, task.cap);
                scores.store(row + i);
            }
        }
    }

    // The scores of a tile of positions for `count` queries.
    template <int count>
    static QUANTLAB_OUTLINE void score(const AttentionTask& task, const float* keys, int first, float* out) {
        const float* const* queries = task.queries + first;
        L sums[count];
        QUANTLAB_UNROLL
        for (int q = 0; q < count; ++q) sums[q] = L::zero();
        for (int d = 0; d < task.head_size; ++d) {
            const L key = L::load(keys + d * tile_positions);
            QUANTLAB_UNROLL
            for (int q = 0; q < count; ++q) sums[q] = L::fma(L::broadcast(queries[q][d]), key, sums[q]);
        }
        const L scale = L::broadcast(task.scale);
        QUANTLAB_UNROLL
        for (int q = 0; q < count; ++q) {
            L scores = sums[q] * scale;
            if (task.cap != 0.0f) scores = lane_soft_cap(scores, task.cap);
            scores.store(out + q * attention_chunk);
        }
    }

    // In place: scores -> e^(score - largest) in the query's range, and their sum.
    static void soften(float* scores, int start, Range own, float& largest, float& sum) {
        const int first = own.first - start, last = own.last - start;
        const int begin = first / 16 * 16, end = last / 16 * 16 + 16;
        fill(scores + begin, first - begin, lowest);
        fill(scores + last + 1, end - last - 1, lowest);
        L most = L::broadcast(lowest);
        for (int i = begin; i < end; i += 16) most = L::max(most, L::load(scores + i));
        largest = most.fold_max();
        const L shift = L::broadcast(largest);
        for (int i = begin; i < end; i += 16) lane_exp(L::load(scores + i) - shift).store(scores + i);
        fill(scores + begin, first - begin, 0.0f);
        fill(scores + last + 1, end - last - 1, 0.0f);
        L sums = L::zero();
        for (int i = begin; i < end; i += 16) sums = sums + L::load(scores + i);
        sum = sums.fold_sum();
    }

    // What a tile's values are weighted with: of query q and position p of the tile, first[q * stride + p].
    struct Weights {
        const float* first;
        int stride;
    };

    // Adds some columns of a tile's values, weighted.
    static QUANTLAB_INLINE void add_columns(const AttentionTask& task, const float* values, Weights weights, Range tile,
                                            Range columns, Queries readers, const AttentionState& state) {
        for_each_tile<L::value_tile>(readers.count, [&]<int count>(int i) {
            add_tile<count>(task, values, weights, readers.first + i, tile, columns, state);
        });
    }

    // For `count` queries: where all see a position together, else one by one.
    template <int count>
    static QUANTLAB_INLINE void add_tile(const AttentionTask& task, const float* values, Weights weights, int first, Range tile,
                                         Range columns, const AttentionState& state) {
        Range together = tile;
        for (int q = 0; q < count; ++q) together = common(together, seen(task, first + q, tile));
        const auto places = [&](Range part) { return Range{part.first - tile.first, part.last - tile.first}; };
        const auto add_alone = [&](Range part) {
            for (int q = first; q < first + count; ++q) {
                const Range own = seen(task, q, part);
                if (!own.empty()) add<1>(task.head_size, values, weights, q, places(own), columns, state);
            }
        };
        if (together.empty()) return add_alone(tile);
        if (together.first > tile.first) add_alone({tile.first, together.first - 1});
        add<count>(task.head_size, values, weights, first, places(together), columns, state);
        if (together.last < tile.last) add_alone({together.last + 1, tile.last});
    }

    template <int count>
    static QUANTLAB_OUTLINE void add(int size, const float* values, Weights weights, int first, Range places, Range columns,
                                     const AttentionState& state) {
        const float* factors = weights.first + first * weights.stride;
        float* out = state.values + static_cast<std::ptrdiff_t>(first) * size;
        for (int d = columns.first; d < columns.last; d += 16) {
            L sums[count];
            QUANTLAB_UNROLL
            for (int q = 0; q < count; ++q) sums[q] = L::load(out + q * size + d);
            for (int p = places.first; p <= places.last; ++p) {
                const L value = L::load(values + p * size + d);
                QUANTLAB_UNROLL
                for (int q = 0; q < count; ++q) {
                    sums[q] = L::fma(L::broadcast(factors[q * weights.stride + p]), value, sums[q]);
                }
            }
            QUANTLAB_UNROLL
            for (int q = 0; q < count; ++q) sums[q].store(out + q * size + d);
        }
    }
};

}  // namespace quantlab::engine
