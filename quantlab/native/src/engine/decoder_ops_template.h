// `DecoderOps` over a class of 16 lanes (lanes.h); the scalar one is the specification.
#pragma once

#include "decoder_ops.h"
#include "kv_cache.h"
#include "lane_math.h"
#include "lanes.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace quantlab::engine {

template <typename L>
struct DecoderOpsOver {
    static float sum_of(const float* x, int n) {
        L sum = L::zero();
        for (int i = 0; i < n; i += 16) sum = sum + L::load(x + i);
        return sum.fold_sum();
    }

    static void rms_norm(const float* x, const float* weight, int n, float epsilon, float* out) {
        L squares = L::zero();
        for (int i = 0; i < n; i += 16) {
            const L v = L::load(x + i);
            squares = L::fma(v, v, squares);
        }
        const float mean = squares.fold_sum() / static_cast<float>(n);
        const L factor = L::broadcast(1.0f / std::sqrt(mean + epsilon));
        for (int i = 0; i < n; i += 16) ((L::load(x + i) * factor) * L::load(weight + i)).store(out + i);
    }

    static void layer_norm(const float* x, const float* weight, const float* bias, int n, float epsilon, float* out) {
        const L mean = L::broadcast(sum_of(x, n) / static_cast<float>(n));
        L squares = L::zero();
        for (int i = 0; i < n; i += 16) {
            const L v = L::load(x + i) - mean;
            squares = L::fma(v, v, squares);
        }
        const L factor = L::broadcast(1.0f / std::sqrt(squares.fold_sum() / static_cast<float>(n) + epsilon));
        for (int i = 0; i < n; i += 16) {
            const L v = (L::load(x + i) - mean) * factor;
            L::fma(v, L::load(weight + i), L::load(bias + i)).store(out + i);
        }
    }

    static void add(float* x, const float* y, int n) {
        for (int i = 0; i < n; i += 16) (L::load(x + i) + L::load(y + i)).store(x + i);
    }

    static void scale(float* x, float factor, int n) {
        const L f = L::broadcast(factor);
        for (int i = 0; i < n; i += 16) (L::load(x + i) * f).store(x + i);
    }

    static L capped(L x, float cap) { return L::broadcast(cap) * lane_tanh(x / L::broadcast(cap)); }

    static void cap(float* x, float limit, int n) {
        for (int i = 0; i < n; i += 16) capped(L::load(x + i), limit).store(x + i);
    }

    // Columns i and i + half are a pair.
    static void rotate(float* head, const float* cosines, const float* sines, int half) {
        int i = 0;
        for (; i + 16 <= half; i += 16) {
            const L a = L::load(head + i), b = L::load(head + half + i);
            const L c = L::load(cosines + i), s = L::load(sines + i);
            (a * c - b * s).store(head + i);
            (b * c + a * s).store(head + half + i);
        }
        for (; i < half; ++i) {
            const float a = head[i], b = head[half + i];
            const float ac = a * cosines[i], bs = b * sines[i], bc = b * cosines[i], as = a * sines[i];
            head[i] = ac - bs;
            head[half + i] = bc + as;
        }
    }

    static L activated(Activation activation, L x) {
        switch (activation) {
            case Activation::silu: return lane_silu(x);
            case Activation::gelu_tanh: return lane_gelu_tanh(x);
            case Activation::gelu_erf: return lane_gelu_erf(x);
        }
        return x;
    }

    static void activate(Activation activation, const float* gate, const float* up, int n, float* out) {
        for (int i = 0; i < n; i += 16) {
            L v = activated(activation, L::load(gate + i));
            if (up != nullptr) v = v * L::load(up + i);
            v.store(out + i);
        }
    }

    // ---- the cache

    // The scale of 32 columns and their codes.
    static float quantize_block(const float* x, std::int8_t* codes) {
        const L low = L::load(x), high = L::load(x + 16);
        const float largest = L::max(L::abs(low), L::abs(high)).fold_max();
        const float scale = largest / 127.0f;
        const L inverse = L::broadcast(scale == 0.0f ? 0.0f : 1.0f / scale);
        alignas(64) float rounded[32];
        L::round(low * inverse).store(rounded);
        L::round(high * inverse).store(rounded + 16);
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::int8_t>(rounded[i]);
        return scale;
    }

    static std::uint16_t half_of(float x) {
        alignas(64) std::uint16_t halves[16];
        L::broadcast(x).store_half(halves);
        return halves[0];
    }

    static void store_key(CacheType type, std::uint8_t* keys, int position, const float* key, int head_size) {
        std::uint8_t* tile = keys + position / tile_positions * key_tile_bytes(type, head_size);
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
            for (int d = 0; d < head_size; d += cache_block) {
                std::int8_t codes[cache_block];
                const std::uint16_t scale = half_of(quantize_block(key + d, codes));
                std::memcpy(tile + 2 * lane, &scale, 2);
                for (int i = 0; i < cache_block; ++i) {
                    tile[2 * tile_positions + i * tile_positions + lane] = static_cast<std::uint8_t>(codes[i]);
                }
                tile += 2 * tile_positions + cache_block * tile_positions;
            }
        }
    }

    static void store_value(CacheType type, std::uint8_t* values, int position, const float* value, int head_size) {
        std::uint8_t* row = values + position * value_row_bytes(type, head_size);
        if (type == CacheType::f32) {
            std::memcpy(row, value, sizeof(float) * static_cast<std::size_t>(head_size));
        } else if (type == CacheType::f16) {
            for (int d = 0; d < head_size; d += 16) {
                L::load(value + d).store_half(reinterpret_cast<std::uint16_t*>(row) + d);
            }
        } else {
            for (int d = 0; d < head_size; d += cache_block) {
                const std::uint16_t scale = half_of(quantize_block(value + d, reinterpret_cast<std::int8_t*>(row + 2)));
                std::memcpy(row, &scale, 2);
                row += 2 + cache_block;
            }
        }
    }

    // ---- attention: scores, softmax, weighted sum of values

    template <CacheType type>
    static L column(const std::uint8_t* tile, int d) {
        if constexpr (type == CacheType::f32) return L::load(reinterpret_cast<const float*>(tile) + d * 16);
        return L::load_half(reinterpret_cast<const std::uint16_t*>(tile) + d * 16);
    }

    // The scores of one tile for `heads` queries.
    template <CacheType type, int heads>
    static void tile_scores(const AttentionTask& task, const std::uint8_t* tile, int head, int place) {
        const float* q = task.queries + head * task.head_size;
        L sums[heads];
        for (int h = 0; h < heads; ++h) sums[h] = L::zero();
        if constexpr (type == CacheType::q8_0) {
            for (int d = 0; d < task.head_size; d += cache_block) {
                const L scales = L::load_half(reinterpret_cast<const std::uint16_t*>(tile));
                const auto* codes = reinterpret_cast<const std::int8_t*>(tile + 2 * tile_positions);
                L part[heads];
                for (int h = 0; h < heads; ++h) part[h] = L::zero();
                for (int i = 0; i < cache_block; ++i) {
                    const L k = L::load_int8(codes + i * tile_positions);
                    for (int h = 0; h < heads; ++h) {
                        part[h] = L::fma(L::broadcast(q[h * task.head_size + d + i]), k, part[h]);
                    }
                }
                for (int h = 0; h < heads; ++h) sums[h] = L::fma(part[h], scales, sums[h]);
                tile += 2 * tile_positions + cache_block * tile_positions;
            }
        } else {
            for (int d = 0; d < task.head_size; ++d) {
                const L k = column<type>(tile, d);
                for (int h = 0; h < heads; ++h) {
                    sums[h] = L::fma(L::broadcast(q[h * task.head_size + d]), k, sums[h]);
                }
            }
        }
        for (int h = 0; h < heads; ++h) {
            L score = sums[h] * L::broadcast(task.scale);
            if (task.cap != 0.0f) score = capped(score, task.cap);
            score.store(task.scores + (head + h) * task.score_stride + place);
        }
    }

    // In place: scores -> e^(score - largest), 0 outside first..last; returns their sum.
    static float soften(float* scores, int count, int skipped_before, int valid) {
        const float lowest = -std::numeric_limits<float>::infinity();
        for (int i = 0; i < skipped_before; ++i) scores[i] = lowest;
        for (int i = skipped_before + valid; i < count; ++i) scores[i] = lowest;
        L largest = L::broadcast(lowest);
        for (int i = 0; i < count; i += 16) largest = L::max(largest, L::load(scores + i));
        const L shift = L::broadcast(largest.fold_max());
        for (int i = 0; i < count; i += 16) lane_exp(L::load(scores + i) - shift).store(scores + i);
        for (int i = 0; i < skipped_before; ++i) scores[i] = 0.0f;
        for (int i = skipped_before + valid; i < count; ++i) scores[i] = 0.0f;
        return sum_of(scores, count);
    }

    // The weighted sum of `lanes` x 16 columns of the values from column d on.
    template <CacheType type, int lanes>
    static void weighted_values(const AttentionTask& task, int head, int d, float inverse_sum, int base) {
        L sums[lanes];
        for (int l = 0; l < lanes; ++l) sums[l] = L::zero();
        const std::size_t stride = value_row_bytes(type, task.head_size);
        const std::uint8_t* row = task.values + static_cast<std::size_t>(task.first) * stride;
        const float* weights = task.scores + head * task.score_stride - base;
        for (int position = task.first; position <= task.last; ++position, row += stride) {
            float weight = weights[position];
            L v[lanes];
            if constexpr (type == CacheType::q8_0) {
                const std::uint8_t* block = row + d / cache_block * (2 + cache_block);
                const auto* codes = reinterpret_cast<const std::int8_t*>(block + 2) + d % cache_block;
                for (int l = 0; l < lanes; ++l) v[l] = L::load_int8(codes + 16 * l);
                weight *= float_of(block);
            } else if constexpr (type == CacheType::f16) {
                for (int l = 0; l < lanes; ++l) {
                    v[l] = L::load_half(reinterpret_cast<const std::uint16_t*>(row) + d + 16 * l);
                }
            } else {
                for (int l = 0; l < lanes; ++l) v[l] = L::load(reinterpret_cast<const float*>(row) + d + 16 * l);
            }
            const L w = L::broadcast(weight);
            for (int l = 0; l < lanes; ++l) sums[l] = L::fma(w, v[l], sums[l]);
        }
        const L inverse = L::broadcast(inverse_sum);
        for (int l = 0; l < lanes; ++l) {
            (sums[l] * inverse).store(task.out + head * task.head_size + d + 16 * l);
        }
    }

    static float float_of(const std::uint8_t* half) {
        alignas(64) std::uint16_t halves[16] = {};
        std::memcpy(halves, half, 2);
        alignas(64) float floats[16];
        L::load_half(halves).store(floats);
        return floats[0];
    }

    template <CacheType type>
    static void attend_in(const AttentionTask& task) {
        const int first_tile = task.first / tile_positions, last_tile = task.last / tile_positions;
        const int base = first_tile * tile_positions, count = (last_tile - first_tile + 1) * tile_positions;
        const std::size_t stride = key_tile_bytes(type, task.head_size);
        for (int t = first_tile; t <= last_tile; ++t) {
            const std::uint8_t* tile = task.keys + static_cast<std::size_t>(t) * stride;
            const int place = (t - first_tile) * tile_positions;
            int head = 0;
            for (; head + 4 <= task.group; head += 4) tile_scores<type, 4>(task, tile, head, place);
            for (; head < task.group; ++head) tile_scores<type, 1>(task, tile, head, place);
        }
        for (int head = 0; head < task.group; ++head) {
            float* scores = task.scores + head * task.score_stride;
            const float sum = soften(scores, count, task.first - base, task.last - task.first + 1);
            const float inverse = 1.0f / sum;
            // In q8_0 a block of 32 columns shares its scale.
            constexpr int widest = type == CacheType::q8_0 ? 2 : 4;
            int d = 0;
            for (; d + 16 * widest <= task.head_size; d += 16 * widest) {
                weighted_values<type, widest>(task, head, d, inverse, base);
            }
            for (; d < task.head_size; d += 16) weighted_values<type, 1>(task, head, d, inverse, base);
        }
    }

    static void attend(CacheType type, const AttentionTask& task) {
        switch (type) {
            case CacheType::f32: return attend_in<CacheType::f32>(task);
            case CacheType::f16: return attend_in<CacheType::f16>(task);
            case CacheType::q8_0: return attend_in<CacheType::q8_0>(task);
        }
    }

    static float sum(const float* x, std::int64_t n) {
        constexpr int streams = 4;
        L sums[streams];
        for (int s = 0; s < streams; ++s) sums[s] = L::zero();
        for (std::int64_t i = 0; i < n; i += 16 * streams) {
            for (int s = 0; s < streams; ++s) sums[s] = sums[s] + L::load(x + i + 16 * s);
        }
        return ((sums[0] + sums[1]) + (sums[2] + sums[3])).fold_sum();
    }

    static constexpr DecoderOps ops() {
        return {rms_norm, layer_norm, add,       scale,       cap,    rotate,
                activate, store_key,  store_value, attend, sum};
    }
};

}  // namespace quantlab::engine
