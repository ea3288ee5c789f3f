// Quantized weights by int8 activations: exact integer dots of a block, added up in fp32. See packed_matrix.h.
#pragma once

#include "matmul_tiles.h"

namespace quantlab::engine {

template <typename L, typename Layout>
struct ByCodes {
    static void multiply(const Multiplication& job) {
        for_each_code_tile<L>(job, [&]<int group_count, int token_count>(int group, int token) {
            multiply_tile<group_count, token_count>(job, group, token);
        });
    }

private:
    using Block = BlockLanes<L, Layout>;
    using Dot = typename L::template Dot<Layout::bits>;

    template <int group_count, int token_count>
    static QUANTLAB_OUTLINE void multiply_tile(const Multiplication& job, int first_group, std::int64_t token) {
        const int columns = job.tokens.columns;
        const int blocks = columns / block_columns;
        const std::int64_t group_bytes = static_cast<std::int64_t>(blocks) * Layout::bytes;
        const std::uint8_t* block = job.storage + first_group * group_bytes;
        const CodedTokens& x = job.tokens.by_block;
        const std::int8_t* codes = x.codes + token * columns;
        const float* scales = x.scales + token * blocks;
        const float* block_sums = x.sums + token * blocks;
        L sums[group_count][token_count];
        set_to_zero(sums);
        for (int b = 0; b < blocks; ++b, block += Layout::bytes, codes += block_columns) {
            QUANTLAB_UNROLL
            for (int g = 0; g < group_count; ++g) {
                const std::uint8_t* weights = block + g * group_bytes;
                prefetch_ahead<Layout::bytes>(weights);
                Dot dots[token_count];
                add_products(weights, codes, columns, dots);
                const auto scaling = Block::scaling(weights);
                QUANTLAB_UNROLL
                for (int t = 0; t < token_count; ++t) {
                    const int at = t * blocks + b;
                    L& sum = sums[g][t];
                    sum = L::fma(dots[t].total(), scaling.scale * L::broadcast(scales[at]), sum);
                    sum = L::fma(scaling.minimum, L::broadcast(block_sums[at]), sum);
                }
            }
        }
        store_tile(sums, job, first_group, token);
    }

    // The same address, which the compiler does not know: activations of the first eight steps are not worth registers.
    static QUANTLAB_INLINE const std::int8_t* read_again(const std::int8_t* codes) {
#if defined(__GNUC__)
        __asm__("" : "+r"(codes));
#endif
        return codes;
    }

    template <int token_count>
    static QUANTLAB_INLINE void add_products(const std::uint8_t* block, const std::int8_t* codes, int stride,
                                             Dot (&dots)[token_count]) {
        constexpr int planes = L::template planes<Layout::bits>;
        QUANTLAB_UNROLL
        for (int i = 0; i < 8 * planes; ++i) {
            if (i == 8) codes = read_again(codes);
            const int chunk = planes == 2 ? i % 8 : i / 2 + i % 2 * 4;  // both nibbles of a vector, then the next
            auto weights = Block::codes(block, chunk);
            if constexpr (planes == 2) {
                weights = i < 8 ? L::low_nibbles(weights) : L::high_nibbles(weights);
            }
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                dots[t].add(weights, i, codes + t * stride + 4 * chunk);
            }
        }
    }
};

}  // namespace quantlab::engine
