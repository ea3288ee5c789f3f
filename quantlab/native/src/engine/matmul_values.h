// Weights by float activations, columns in ascending order. See packed_matrix.h.
#pragma once

#include "matmul_tiles.h"

namespace quantlab::engine {

// Columns of sixteen weights in a float type.
template <typename L, Element element>
struct FloatColumns {
    static constexpr int bytes = group_rows * static_cast<int>(element_bytes(element));
    // As many tokens as are multiplied without decoding a panel first.
    static constexpr int direct_tokens = L::value_tile;

    static constexpr std::int64_t group_bytes(std::int64_t columns) { return columns * bytes; }

    // Calls use(weights, column) for each of `count` columns, weights being those of `group_count` groups.
    template <int group_count, typename Use>
    static QUANTLAB_INLINE void for_each(const std::uint8_t* groups, std::int64_t group_stride, int first_column,
                                         int count, const Use& use) {
        const std::uint8_t* column = groups + static_cast<std::int64_t>(first_column) * bytes;
        for (int c = 0; c < count; ++c, column += bytes) {
            L weights[group_count];
            QUANTLAB_UNROLL
            for (int g = 0; g < group_count; ++g) {
                weights[g] = load(column + g * group_stride);
            }
            use(weights, c);
        }
    }

private:
    static QUANTLAB_INLINE L load(const std::uint8_t* column) {
        if constexpr (element == Element::f32) {
            return L::load(reinterpret_cast<const float*>(column));
        } else if constexpr (element == Element::f16) {
            return L::load_half(reinterpret_cast<const std::uint16_t*>(column));
        } else {
            return L::load_brain(reinterpret_cast<const std::uint16_t*>(column));
        }
    }
};

// Columns of sixteen quantized weights, in whole blocks.
template <typename L, typename Layout>
struct BlockColumns {
    static constexpr int direct_tokens = 1;

    static constexpr std::int64_t group_bytes(std::int64_t columns) {
        return columns / block_columns * Layout::bytes;
    }

    template <int group_count, typename Use>
    static QUANTLAB_INLINE void for_each(const std::uint8_t* groups, std::int64_t group_stride, int first_column,
                                         int count, const Use& use) {
        using Block = BlockLanes<L, Layout>;
        const std::uint8_t* block = groups + group_bytes(first_column);
        for (int c = 0; c < count; c += block_columns, block += Layout::bytes) {
            QUANTLAB_UNROLL
            for (int i = 0; i < block_columns; ++i) {
                L weights[group_count];
                QUANTLAB_UNROLL
                for (int g = 0; g < group_count; ++g) {
                    const std::uint8_t* of_group = block + g * group_stride;
                    weights[g] = Block::weight(L::column(Block::codes(of_group, i / 4), i % 4), Block::scaling(of_group));
                }
                use(weights, c + i);
            }
        }
    }
};

template <typename L, typename Columns>
struct ByValues {
    static void multiply(const Multiplication& job) {
        if (job.tokens.count <= Columns::direct_tokens) {
            with_constant<Columns::direct_tokens>(job.tokens.count, [&]<int token_count>() {
                // Several groups at once where one's sums would wait for each other.
                constexpr int most = L::groups_at_once > token_count ? L::groups_at_once / token_count : 1;
                for_each_run<most>(job.first_group, job.last_group, [&]<int group_count>(int group) {
                    multiply_directly<group_count, token_count>(job, group);
                });
            });
            return;
        }
        for (int group = job.first_group; group < job.last_group; ++group) {
            for (int token = 0; token < job.tokens.count; token += waiting_tokens) {
                const int rest = job.tokens.count - token;
                multiply_panels(job, group, token, rest < waiting_tokens ? rest : waiting_tokens);
            }
        }
    }

private:
    // Decoded columns in the first-level cache, 16 KiB; the sums of as many tokens, 16 KiB, that wait for the next panel.
    static constexpr int panel_columns = 256;
    static constexpr int waiting_tokens = 256;

    template <int group_count, int token_count>
    static void multiply_directly(const Multiplication& job, int first_group) {
        const int columns = job.tokens.columns;
        const std::int64_t group_bytes = Columns::group_bytes(columns);
        L sums[group_count][token_count];
        for (auto& of_group : sums) {
            for (L& sum : of_group) {
                sum = L::zero();
            }
        }
        Columns::template for_each<group_count>(job.storage + first_group * group_bytes, group_bytes, 0, columns,
                                                [&](const L(&weights)[group_count], int c) QUANTLAB_INLINE_LAMBDA {
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                const L value = L::broadcast(job.tokens.values[static_cast<std::int64_t>(t) * columns + c]);
                QUANTLAB_UNROLL
                for (int g = 0; g < group_count; ++g) {
                    sums[g][t] = L::fma(weights[g], value, sums[g][t]);
                }
            }
        });
        for (int g = 0; g < group_count; ++g) {
            for (int t = 0; t < token_count; ++t) {
                store_sums(sums[g][t], job, first_group + g, t);
            }
        }
    }

    static void multiply_panels(const Multiplication& job, int group, std::int64_t first_token, int token_count) {
        alignas(64) float panel[panel_columns * group_rows];
        alignas(64) float waiting[waiting_tokens * group_rows];
        const int columns = job.tokens.columns;
        const std::uint8_t* weights = job.storage + group * Columns::group_bytes(columns);
        const float* values = job.tokens.values + first_token * columns;
        for (int t = 0; t < token_count; ++t) {
            L::zero().store(waiting + t * group_rows);
        }
        for (int first = 0; first < columns; first += panel_columns) {
            const int count = columns - first < panel_columns ? columns - first : panel_columns;
            Columns::template for_each<1>(weights, 0, first, count, [&](const L(&column)[1], int c)
                                          QUANTLAB_INLINE_LAMBDA { column[0].store(panel + c * group_rows); });
            for_each_tile<L::value_tile>(token_count, [&]<int size>(int t) {
                add_panel<size>(panel, count, values + static_cast<std::int64_t>(t) * columns + first, columns,
                                waiting + t * group_rows);
            });
        }
        for (int t = 0; t < token_count; ++t) {
            store_sums(L::load(waiting + t * group_rows), job, group, first_token + t);
        }
    }

    template <int token_count>
    static void add_panel(const float* panel, int count, const float* values, int stride, float* waiting) {
        L sums[token_count];
        for (int t = 0; t < token_count; ++t) {
            sums[t] = L::load(waiting + t * group_rows);
        }
        for (int c = 0; c < count; ++c) {
            const L weight = L::load(panel + c * group_rows);
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                sums[t] = L::fma(weight, L::broadcast(values[t * stride + c]), sums[t]);
            }
        }
        for (int t = 0; t < token_count; ++t) {
            sums[t].store(waiting + t * group_rows);
        }
    }
};

}  // namespace quantlab::engine
