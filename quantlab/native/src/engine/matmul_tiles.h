// What multiplications by codes and by values share: tiles of tokens, blocks of weights as lanes, outputs.
//
// A tile of tokens is multiplied by one or a few groups of sixteen rows at a time: weights unpacked into registers serve
// all its tokens. Included by one file per instruction set; all here is a template over the lanes or inlined always, so
// that no two of those files define the same function.
#pragma once

#include "../numbers.h"
#include "lanes.h"
#include "matmul_kernel.h"
#include "packed_layout.h"

#include <cstdint>

// Before loops over registers. The portable lanes are in memory: unrolled they would only be long.
#if defined(__GNUC__) && defined(__AVX2__)
#define QUANTLAB_UNROLL _Pragma("GCC unroll 16")
#else
#define QUANTLAB_UNROLL
#endif

namespace quantlab::engine {

// Calls work.template operator()<n>() for n = count, which is from 1 to `most`.
template <int most, typename Work>
QUANTLAB_INLINE void with_constant(int count, const Work& work) {
    if constexpr (most > 1) {
        if (count < most) {
            return with_constant<most - 1>(count, work);
        }
    }
    work.template operator()<most>();
}

// Splits tokens 0 .. count - 1 into as few tiles as do with `most` each, all of nearly the same size, and calls
// work.template operator()<size>(first token) for each.
template <int most, typename Work>
QUANTLAB_INLINE void for_each_tile(int count, const Work& work) {
    const int tiles = (count + most - 1) / most;
    int first = 0;
    for (int tile = 0; tile < tiles; ++tile) {
        const int size = (count - first) / (tiles - tile);
        with_constant<most>(size, [&]<int token_count>() { work.template operator()<token_count>(first); });
        first += size;
    }
}

// How far ahead of the multiplication packed weights are asked for.
inline constexpr int prefetch_bytes = 1024;

template <int bytes>
QUANTLAB_INLINE void prefetch_ahead([[maybe_unused]] const std::uint8_t* address) {
#if defined(__GNUC__)
    QUANTLAB_UNROLL
    for (int line = 0; line < (bytes + 63) / 64; ++line) {
        __builtin_prefetch(address + prefetch_bytes + 64 * line);
    }
#endif
}

template <typename L>
QUANTLAB_INLINE void store_sums(const L& sums, const Multiplication& job, int group, std::int64_t token) {
    const std::int64_t row = static_cast<std::int64_t>(group) * group_rows;
    float* out = job.out + token * job.out_stride + row;
    if (job.rows - row >= group_rows) {
        sums.store(out);
    } else {
        sums.store_first(out, static_cast<int>(job.rows - row));
    }
}

template <typename L, int group_count, int token_count>
QUANTLAB_INLINE void set_to_zero(L (&sums)[group_count][token_count]) {
    QUANTLAB_UNROLL
    for (int g = 0; g < group_count; ++g) {
        QUANTLAB_UNROLL
        for (int t = 0; t < token_count; ++t) {
            sums[g][t] = L::zero();
        }
    }
}

template <typename L, int group_count, int token_count>
QUANTLAB_INLINE void store_tile(const L (&sums)[group_count][token_count], const Multiplication& job, int first_group,
                                std::int64_t first_token) {
    QUANTLAB_UNROLL
    for (int g = 0; g < group_count; ++g) {
        QUANTLAB_UNROLL
        for (int t = 0; t < token_count; ++t) {
            store_sums(sums[g][t], job, first_group + g, first_token + t);
        }
    }
}

// What a block of sixteen quantized rows holds, as lanes.
template <typename L, typename Layout>
struct BlockLanes {
    struct Scaling {
        L scale;
        L minimum;
    };

    static QUANTLAB_INLINE Scaling scaling(const std::uint8_t* block) {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(block);
        const L scale = L::load_half(halves);
        if constexpr (Layout::has_minimum) {
            return {scale, L::load_half(halves + group_rows)};
        } else {
            return {scale, scale * L::broadcast(-static_cast<float>(Layout::zero_code))};
        }
    }

    // Columns 4 * chunk to 4 * chunk + 3 of a run of 32, of which a ternary block has eight and others one.
    static QUANTLAB_INLINE typename L::Codes codes(const std::uint8_t* block, int chunk, [[maybe_unused]] int run = 0) {
        if constexpr (Layout::bits == 2) {
            return L::two_bits(L::load_codes(block + Layout::codes + 64 * (run / 4 * 8 + chunk)), run % 4 * 2);
        } else if constexpr (Layout::bits == 8) {
            return L::load_codes(block + Layout::codes + 64 * chunk);
        } else {
            const auto packed = L::load_codes(block + Layout::codes + 64 * (chunk % 4));
            const auto nibbles = chunk < 4 ? L::low_nibbles(packed) : L::high_nibbles(packed);
            if constexpr (Layout::bits == 5) {
                return nibbles | L::fifth_bits(L::load_codes(block + Layout::fifth_bits), chunk);
            } else {
                return nibbles;
            }
        }
    }

    // A product, and in formats with a minimum a sum, each rounded.
    static QUANTLAB_INLINE L weight(const L& code, const Scaling& scaling) {
        if constexpr (Layout::has_minimum) {
            return scaling.scale * code + scaling.minimum;
        } else {
            return scaling.scale * (code - L::broadcast(static_cast<float>(Layout::zero_code)));
        }
    }
};

// Calls work.template operator()<n>(first group of n) for as many runs of `most` groups as there are, then for single
// ones.
template <int most, typename Work>
QUANTLAB_INLINE void for_each_run(int first_group, int last_group, const Work& work) {
    int group = first_group;
    for (; most > 1 && group + most <= last_group; group += most) {
        work.template operator()<most>(group);
    }
    for (; group < last_group; ++group) {
        work.template operator()<1>(group);
    }
}

// How multiplications by codes go through a job: of one token several groups at once, of more a tile by each group.
// Calls work.template operator()<groups, tokens>(first group, first token).
template <typename L, typename Work>
QUANTLAB_INLINE void for_each_code_tile(const Multiplication& job, const Work& work) {
    if (job.tokens.count == 1) {
        for_each_run<L::code_groups>(job.first_group, job.last_group, [&]<int group_count>(int group) {
            work.template operator()<group_count, 1>(group, 0);
        });
        return;
    }
    for (int group = job.first_group; group < job.last_group; ++group) {
        for_each_tile<L::code_tile>(job.tokens.count, [&]<int token_count>(int token) {
            work.template operator()<1, token_count>(group, token);
        });
    }
}

}  // namespace quantlab::engine
