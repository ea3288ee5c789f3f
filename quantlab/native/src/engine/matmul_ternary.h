// Ternary weights by int8 activations with one scale a token: exact integer dots of a block, added up in fp32. See
// packed_matrix.h.
#pragma once

#include "matmul_tiles.h"

namespace quantlab::engine {

template <typename L, typename Layout>
struct ByTernaryCodes {
    static void multiply(const Multiplication& job) {
        for_each_code_tile<L>(job, [&]<int group_count, int token_count>(int group, int token) {
            multiply_tile<group_count, token_count>(job, group, token);
        });
    }

private:
    using Dot = typename L::template Dot<Layout::bits>;

    static constexpr int half_columns = Layout::columns / 2;  // of four planes of bits in the same bytes
    static constexpr int half_vectors = 8;

    template <int group_count, int token_count>
    static QUANTLAB_OUTLINE void multiply_tile(const Multiplication& job, int first_group, std::int64_t token) {
        const int columns = job.tokens.columns;
        const int blocks = columns / Layout::columns;
        const std::int64_t group_bytes = static_cast<std::int64_t>(blocks) * Layout::bytes;
        const std::uint8_t* block = job.storage + first_group * group_bytes;
        const CodedTokens& x = job.tokens.by_token;
        const std::int8_t* codes = x.codes + token * columns;
        const float* scales = x.scales + token;
        const float* block_sums = x.sums + token * blocks;
        L sums[group_count][token_count];
        set_to_zero(sums);
        for (int b = 0; b < blocks; ++b, block += Layout::bytes, codes += Layout::columns) {
            L low[group_count][token_count], high[group_count][token_count];
            take_products(block + Layout::codes, group_bytes, codes, columns, low);
            take_products(block + Layout::codes + 64 * half_vectors, group_bytes, codes + half_columns, columns, high);
            QUANTLAB_UNROLL
            for (int g = 0; g < group_count; ++g) {
                const std::uint8_t* weights = block + g * group_bytes;
                prefetch_ahead<1>(weights);
                const L scale = L::load_half(reinterpret_cast<const std::uint16_t*>(weights));
                QUANTLAB_UNROLL
                for (int t = 0; t < token_count; ++t) {
                    // The codes are the weights plus 1. All are whole numbers below 2^24: no sum is rounded.
                    const L dot = low[g][t] + high[g][t] - L::broadcast(block_sums[t * blocks + b]);
                    sums[g][t] = L::fma(dot, scale * L::broadcast(scales[t]), sums[g][t]);
                }
            }
        }
        store_tile(sums, job, first_group, token);
    }

    // The sums of code * activation code over half a block. Groups take turns vector by vector: their activations are the
    // same, and memory is read in several places.
    template <int group_count, int token_count>
    static QUANTLAB_INLINE void take_products(const std::uint8_t* vectors, std::int64_t group_bytes,
                                              const std::int8_t* codes, int stride,
                                              L (&products)[group_count][token_count]) {
        Dot dots[group_count][token_count];
        for (int vector = 0; vector < half_vectors; ++vector) {
            QUANTLAB_UNROLL
            for (int g = 0; g < group_count; ++g) {
                const std::uint8_t* place = vectors + g * group_bytes + 64 * vector;
                prefetch_ahead<1>(place);
                const auto packed = L::load_codes(place);
                QUANTLAB_UNROLL
                for (int plane = 0; plane < 4; ++plane) {
                    const auto weights = L::two_bits(packed, 2 * plane);
                    QUANTLAB_UNROLL
                    for (int t = 0; t < token_count; ++t) {
                        dots[g][t].add(weights, 0, codes + t * stride + block_columns * plane + 4 * vector);
                    }
                }
            }
        }
        QUANTLAB_UNROLL
        for (int g = 0; g < group_count; ++g) {
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                products[g][t] = dots[g][t].total();
            }
        }
    }
};

}  // namespace quantlab::engine
