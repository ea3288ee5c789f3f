// Weights by float activations, columns in ascending order. See packed_matrix.h.
#pragma once

#include "matmul_tiles.h"

namespace quantlab::engine {

// Weights in a float type.
template <typename L, Element element>
struct ByFloats {
    static void multiply(const Multiplication& job) {
        const int count = job.tokens.count;
        if (count > L::value_tile) {
            for (int group = job.first_group; group < job.last_group; ++group) {
                for_each_tile<L::value_tile>(count, [&]<int token_count>(int token) {
                    multiply_tile<1, token_count>(job, group, token);
                });
            }
            return;
        }
        with_constant<L::value_tile>(count, [&]<int token_count>() {
            // One group's sums would wait for each other.
            constexpr int groups = L::value_chains > token_count ? L::value_chains / token_count : 1;
            for_each_run<groups>(job.first_group, job.last_group, [&]<int group_count>(int group) {
                multiply_tile<group_count, token_count>(job, group, 0);
            });
        });
    }

private:
    static constexpr int column_bytes = group_rows * static_cast<int>(element_bytes(element));

    template <int group_count, int token_count>
    static QUANTLAB_OUTLINE void multiply_tile(const Multiplication& job, int first_group, std::int64_t token) {
        const int columns = job.tokens.columns;
        const std::int64_t group_bytes = static_cast<std::int64_t>(columns) * column_bytes;
        const std::uint8_t* weights = job.storage + first_group * group_bytes;
        const float* values = job.tokens.values + token * columns;
        L sums[group_count][token_count];
        set_to_zero(sums);
        for (int c = 0; c < columns; ++c, weights += column_bytes) {
            QUANTLAB_UNROLL
            for (int g = 0; g < group_count; ++g) {
                const L weight = load(weights + g * group_bytes);
                QUANTLAB_UNROLL
                for (int t = 0; t < token_count; ++t) {
                    sums[g][t] = L::fma(weight, L::broadcast(values[t * columns + c]), sums[g][t]);
                }
            }
        }
        store_tile(sums, job, first_group, token);
    }

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

// Quantized weights. For one token they are decoded on the way; for more, a panel of a group's columns is decoded into
// the first-level cache for all tokens, whose sums wait in memory from panel to panel.
template <typename L, typename Layout>
struct ByDecoding {
    static void multiply(const Multiplication& job) {
        if (job.tokens.count == 1) {
            for_each_run<2>(job.first_group, job.last_group, [&]<int group_count>(int group) {
                multiply_one<group_count>(job, group);
            });
            return;
        }
        for (int group = job.first_group; group < job.last_group; ++group) {
            for (int token = 0; token < job.tokens.count; token += most_waiting) {
                const int rest = job.tokens.count - token;
                multiply_panels(job, group, token, rest < most_waiting ? rest : most_waiting);
            }
        }
    }

private:
    using Block = BlockLanes<L, Layout>;

    static constexpr int runs = Layout::columns / block_columns;  // of a block
    static constexpr int panel_columns = 256;  // 16 KiB; whole blocks of any format
    static constexpr int most_waiting = 256;   // tokens: 16 KiB

    static constexpr std::int64_t group_bytes(std::int64_t columns) {
        return columns / Layout::columns * Layout::bytes;
    }

    template <int group_count>
    static QUANTLAB_OUTLINE void multiply_one(const Multiplication& job, int first_group) {
        const int columns = job.tokens.columns;
        const std::int64_t stride = group_bytes(columns);
        const std::uint8_t* block = job.storage + first_group * stride;
        const float* values = job.tokens.values;
        L sums[group_count][1];
        set_to_zero(sums);
        for (int c = 0; c < columns; c += Layout::columns, block += Layout::bytes) {
            for (int run = 0; run < runs; ++run, values += block_columns) {
                QUANTLAB_UNROLL
                for (int chunk = 0; chunk < 8; ++chunk) {
                    QUANTLAB_UNROLL
                    for (int g = 0; g < group_count; ++g) {
                        const auto scaling = Block::scaling(block + g * stride);
                        const auto codes = Block::codes(block + g * stride, chunk, run);
                        QUANTLAB_UNROLL
                        for (int i = 0; i < 4; ++i) {
                            const L weight = Block::weight(L::column(codes, i), scaling);
                            sums[g][0] = L::fma(weight, L::broadcast(values[4 * chunk + i]), sums[g][0]);
                        }
                    }
                }
            }
        }
        store_tile(sums, job, first_group, 0);
    }

    static void multiply_panels(const Multiplication& job, int group, std::int64_t first_token, int token_count) {
        alignas(64) float panel[panel_columns * group_rows];
        alignas(64) float waiting[most_waiting * group_rows];
        const int columns = job.tokens.columns;
        const std::uint8_t* weights = job.storage + group * group_bytes(columns);
        const float* values = job.tokens.values + first_token * columns;
        for (int t = 0; t < token_count; ++t) {
            L::zero().store(waiting + t * group_rows);
        }
        for (int first = 0; first < columns; first += panel_columns) {
            const int count = columns - first < panel_columns ? columns - first : panel_columns;
            decode(weights + group_bytes(first), count, panel);
            for_each_tile<L::value_tile>(token_count, [&]<int size>(int t) {
                add_panel<size>(panel, count, values + static_cast<std::int64_t>(t) * columns + first, columns,
                                waiting + t * group_rows);
            });
        }
        for (int t = 0; t < token_count; ++t) {
            store_sums(L::load(waiting + t * group_rows), job, group, first_token + t);
        }
    }

    static void decode(const std::uint8_t* block, int count, float* panel) {
        for (int c = 0; c < count; c += Layout::columns, block += Layout::bytes) {
            const auto scaling = Block::scaling(block);
            for (int run = 0; run < runs; ++run) {
                QUANTLAB_UNROLL
                for (int chunk = 0; chunk < 8; ++chunk) {
                    const auto codes = Block::codes(block, chunk, run);
                    QUANTLAB_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        Block::weight(L::column(codes, i), scaling).store(panel + 4 * chunk * group_rows + i * group_rows);
                    }
                }
                panel += block_columns * group_rows;
            }
        }
    }

    template <int token_count>
    static QUANTLAB_OUTLINE void add_panel(const float* panel, int count, const float* values, int stride, float* waiting) {
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
