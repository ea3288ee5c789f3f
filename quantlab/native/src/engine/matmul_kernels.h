// Multiplications by packed weights, written once over the lanes of lanes.h: the formula is in packed_matrix.h.
//
// Few tokens read the packed weights as they lie in memory. With more, a panel of one group's columns is unpacked into
// the first-level cache and used for all tokens, a tile of them at a time; the sums wait in memory from panel to panel.
//
// Included by one file per instruction set. Everything here is a template over the lanes or inlined always, so that no
// two of those files define the same function.
#pragma once

#include "../numbers.h"
#include "lanes.h"
#include "matmul_kernel.h"
#include "packed_layout.h"

#include <cstdint>
#include <limits>

// Before loops over registers. The portable lanes are in memory: unrolled they would only be long.
#if defined(__GNUC__) && defined(__AVX2__)
#define QUANTLAB_UNROLL _Pragma("GCC unroll 16")
#else
#define QUANTLAB_UNROLL
#endif

namespace quantlab::engine {

// How far ahead of the multiplication packed weights are asked for.
inline constexpr int prefetch_bytes = 2048;

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
struct Scaling {
    L scale;
    L minimum;
};

// Where a tile of tokens gets a block of weights from: the packed matrix.
template <typename L, typename Layout>
struct PackedBlocks {
    static constexpr int bits = Layout::bits;
    static constexpr int bytes = Layout::bytes;

    static QUANTLAB_INLINE void prefetch(const std::uint8_t* block) { prefetch_ahead<bytes>(block); }

    static QUANTLAB_INLINE typename L::Codes chunk(const std::uint8_t* block, int chunk) {
        if constexpr (bits == 8) {
            return L::load_codes(block + Layout::codes + 64 * chunk);
        } else {
            const auto packed = L::load_codes(block + Layout::codes + 64 * (chunk % 4));
            const auto nibbles = chunk < 4 ? L::low_nibbles(packed) : L::high_nibbles(packed);
            if constexpr (bits == 5) {
                return nibbles | L::fifth_bits(L::load_codes(block + Layout::fifth_bits), chunk);
            } else {
                return nibbles;
            }
        }
    }

    static QUANTLAB_INLINE Scaling<L> scaling(const std::uint8_t* block) {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(block);
        const L scale = L::load_half(halves);
        if constexpr (Layout::has_minimum) {
            return {scale, L::load_half(halves + group_rows)};
        } else {
            return {scale, scale * L::broadcast(-static_cast<float>(Layout::zero_code))};
        }
    }
};

// Or a panel of unpacked blocks: a byte for each code, then scales and minima in fp32.
template <typename L, int code_bits>
struct UnpackedBlocks {
    static constexpr int bits = code_bits;
    static constexpr int scales = group_rows * block_columns;
    static constexpr int minima = scales + 4 * group_rows;
    static constexpr int bytes = minima + 4 * group_rows;

    static QUANTLAB_INLINE void prefetch(const std::uint8_t*) {}

    static QUANTLAB_INLINE typename L::Codes chunk(const std::uint8_t* block, int chunk) {
        return L::load_codes(block + 64 * chunk);
    }

    static QUANTLAB_INLINE Scaling<L> scaling(const std::uint8_t* block) {
        return {L::load(reinterpret_cast<const float*>(block + scales)),
                L::load(reinterpret_cast<const float*>(block + minima))};
    }

    template <typename Packed>
    static QUANTLAB_INLINE void unpack(const std::uint8_t* packed, std::uint8_t* block) {
        QUANTLAB_UNROLL
        for (int chunk = 0; chunk < 8; ++chunk) {
            L::store_codes(Packed::chunk(packed, chunk), block + 64 * chunk);
        }
        const Scaling<L> scaling = Packed::scaling(packed);
        scaling.scale.store(reinterpret_cast<float*>(block + scales));
        scaling.minimum.store(reinterpret_cast<float*>(block + minima));
    }
};

// The tokens of a tile from a column on: rows of `stride` activations, and `block_stride` blocks.
struct CodeTokens {
    const std::int8_t* codes;
    const float* scales;
    const float* sums;
    int stride;
    int block_stride;
};

QUANTLAB_INLINE CodeTokens code_tokens(const Tokens& x, std::int64_t token, int block) {
    const int blocks = x.columns / block_columns;
    const std::int64_t first_block = token * blocks + block;
    return {x.codes + first_block * block_columns, x.scales + first_block, x.sums + first_block, x.columns, blocks};
}

// sums[t] goes on over `blocks` blocks of weights and of token t's int8 activations.
template <typename L, typename Source, int token_count>
QUANTLAB_INLINE void add_code_products(const std::uint8_t* block, int blocks, const CodeTokens& x,
                                       L (&sums)[token_count]) {
    for (int b = 0; b < blocks; ++b, block += Source::bytes) {
        Source::prefetch(block);
        typename L::template Dot<Source::bits> dots[token_count];
        QUANTLAB_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int chunk = i / 2 + i % 2 * 4;  // both nibbles of a vector, then the next
            const auto weights = Source::chunk(block, chunk);
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                dots[t].add(weights, i, x.codes + t * x.stride + block_columns * b + 4 * chunk);
            }
        }
        const Scaling<L> weights = Source::scaling(block);
        QUANTLAB_UNROLL
        for (int t = 0; t < token_count; ++t) {
            const int at = t * x.block_stride + b;
            sums[t] = L::fma(dots[t].total(), weights.scale * L::broadcast(x.scales[at]), sums[t]);
            sums[t] = L::fma(weights.minimum, L::broadcast(x.sums[at]), sums[t]);
        }
    }
}

// Columns of sixteen weights in a float type.
template <typename L, Element element>
struct FloatColumns {
    static constexpr int bytes = group_rows * static_cast<int>(element_bytes(element));

    static QUANTLAB_INLINE L load(const std::uint8_t* column) {
        if constexpr (element == Element::f32) {
            return L::load(reinterpret_cast<const float*>(column));
        } else if constexpr (element == Element::f16) {
            return L::load_half(reinterpret_cast<const std::uint16_t*>(column));
        } else {
            return L::load_brain(reinterpret_cast<const std::uint16_t*>(column));
        }
    }

    static constexpr std::int64_t group_bytes(std::int64_t columns) { return columns * bytes; }

    static QUANTLAB_INLINE void decode(const std::uint8_t* group, int first_column, int columns, float* panel) {
        const std::uint8_t* weights = group + static_cast<std::int64_t>(first_column) * bytes;
        for (int c = 0; c < columns; ++c) {
            load(weights + c * bytes).store(panel + c * group_rows);
        }
    }
};

// Columns of sixteen quantized weights.
template <typename L, typename Layout>
struct BlockColumns {
    using Source = PackedBlocks<L, Layout>;

    static constexpr std::int64_t group_bytes(std::int64_t columns) {
        return columns / block_columns * Layout::bytes;
    }

    // A product, and in formats with a minimum a sum, each rounded.
    static QUANTLAB_INLINE L weight(const L& code, const Scaling<L>& scaling) {
        if constexpr (Layout::has_minimum) {
            return scaling.scale * code + scaling.minimum;
        } else {
            return scaling.scale * (code - L::broadcast(static_cast<float>(Layout::zero_code)));
        }
    }

    static QUANTLAB_INLINE void decode(const std::uint8_t* group, int first_column, int columns, float* panel) {
        for (int b = 0; b < columns / block_columns; ++b) {
            const std::uint8_t* block =
                group + static_cast<std::int64_t>(first_column / block_columns + b) * Layout::bytes;
            const Scaling<L> scaling = Source::scaling(block);
            QUANTLAB_UNROLL
            for (int chunk = 0; chunk < 8; ++chunk) {
                const auto codes = Source::chunk(block, chunk);
                QUANTLAB_UNROLL
                for (int i = 0; i < 4; ++i) {
                    weight(L::column(codes, i), scaling).store(panel);
                    panel += group_rows;
                }
            }
        }
    }
};

// sums[g][t] goes on over `columns` columns of group g's weights and of token t's values, `stride` from token to token.
template <typename L, Element element, int group_count, int token_count>
QUANTLAB_INLINE void add_value_products(const std::uint8_t* weights, std::int64_t group_stride, int columns,
                                        const float* values, int stride, L (&sums)[group_count][token_count]) {
    using Columns = FloatColumns<L, element>;
    for (int c = 0; c < columns; ++c, weights += Columns::bytes) {
        QUANTLAB_UNROLL
        for (int g = 0; g < group_count; ++g) {
            const L weight = Columns::load(weights + g * group_stride);
            QUANTLAB_UNROLL
            for (int t = 0; t < token_count; ++t) {
                sums[g][t] = L::fma(weight, L::broadcast(values[t * stride + c]), sums[g][t]);
            }
        }
    }
}

template <typename L>
QUANTLAB_INLINE void store_sums(const L& sums, const Multiplication& job, int group, int token) {
    const std::int64_t row = static_cast<std::int64_t>(group) * group_rows;
    float* out = job.out + token * job.out_stride + row;
    if (job.rows - row >= group_rows) {
        sums.store(out);
    } else {
        sums.store_first(out, static_cast<int>(job.rows - row));
    }
}

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

inline constexpr int panel_tokens = 256;  // whose sums wait in 16 KiB

// A panel of unpacked blocks for int8 activations: 20 KiB.
template <typename L, typename Layout>
struct CodePanel {
    using Packed = PackedBlocks<L, Layout>;
    using Unpacked = UnpackedBlocks<L, Layout::bits>;
    static constexpr int tile = L::template code_tile<Layout::bits>;
    static constexpr int columns = 32 * block_columns;

    static constexpr std::int64_t group_bytes(std::int64_t matrix_columns) {
        return matrix_columns / block_columns * Layout::bytes;
    }

    QUANTLAB_INLINE void fill(const std::uint8_t* group, int first_column, int count) {
        const std::uint8_t* packed = group + group_bytes(first_column);
        for (int b = 0; b < count / block_columns; ++b) {
            Unpacked::template unpack<Packed>(packed + b * Layout::bytes, weights + b * Unpacked::bytes);
        }
    }

    template <int token_count>
    QUANTLAB_INLINE void add_products(const Tokens& x, std::int64_t first_token, int first_column, int count,
                                      L (&sums)[token_count]) const {
        const CodeTokens tokens = code_tokens(x, first_token, first_column / block_columns);
        add_code_products<L, Unpacked>(weights, count / block_columns, tokens, sums);
    }

    alignas(64) std::uint8_t weights[32 * Unpacked::bytes];
};

// A panel of decoded weights for float activations: 16 KiB.
template <typename L, typename Columns>
struct ValuePanel {
    static constexpr int tile = L::value_tile;
    static constexpr int columns = 256;

    static constexpr std::int64_t group_bytes(std::int64_t matrix_columns) {
        return Columns::group_bytes(matrix_columns);
    }

    QUANTLAB_INLINE void fill(const std::uint8_t* group, int first_column, int count) {
        Columns::decode(group, first_column, count, weights);
    }

    template <int token_count>
    QUANTLAB_INLINE void add_products(const Tokens& x, std::int64_t first_token, int first_column, int count,
                                      L (&sums)[token_count]) const {
        const float* values = x.values + first_token * x.columns + first_column;
        L groups[1][token_count];
        for (int t = 0; t < token_count; ++t) {
            groups[0][t] = sums[t];
        }
        add_value_products<L, Element::f32>(reinterpret_cast<const std::uint8_t*>(weights), 0, count, values,
                                            x.columns, groups);
        for (int t = 0; t < token_count; ++t) {
            sums[t] = groups[0][t];
        }
    }

    alignas(64) float weights[columns * group_rows];
};

// Any number of tokens.
template <typename L, typename Panel>
struct ByPanels {
    static void multiply(const Multiplication& job) {
        for (int group = job.first_group; group < job.last_group; ++group) {
            for (int token = 0; token < job.tokens.count; token += panel_tokens) {
                const int rest = job.tokens.count - token;
                multiply_tokens(job, group, token, rest < panel_tokens ? rest : panel_tokens);
            }
        }
    }

private:
    static void multiply_tokens(const Multiplication& job, int group, int first_token, int token_count) {
        Panel panel;
        alignas(64) float waiting[panel_tokens * group_rows];
        const int columns = job.tokens.columns;
        const std::uint8_t* weights = job.storage + group * Panel::group_bytes(columns);
        for (int i = 0; i < token_count; ++i) {
            L::zero().store(waiting + i * group_rows);
        }
        for (int column = 0; column < columns; column += Panel::columns) {
            const int count = columns - column < Panel::columns ? columns - column : Panel::columns;
            panel.fill(weights, column, count);
            for_each_tile<Panel::tile>(token_count, [&]<int size>(int token) {
                multiply_tile<size>(panel, job.tokens, first_token + token, column, count,
                                    waiting + token * group_rows);
            });
        }
        for (int i = 0; i < token_count; ++i) {
            store_sums(L::load(waiting + i * group_rows), job, group, first_token + i);
        }
    }

    template <int token_count>
    static void multiply_tile(const Panel& panel, const Tokens& x, std::int64_t first_token, int column, int count,
                              float* waiting) {
        L sums[token_count];
        for (int t = 0; t < token_count; ++t) {
            sums[t] = L::load(waiting + t * group_rows);
        }
        panel.add_products(x, first_token, column, count, sums);
        for (int t = 0; t < token_count; ++t) {
            sums[t].store(waiting + t * group_rows);
        }
    }
};

// At most `tile` tokens by codes: straight from the packed matrix.
template <typename L, typename Layout>
struct ByCodes {
    using Panel = CodePanel<L, Layout>;

    static void multiply(const Multiplication& job) {
        if (job.tokens.count <= Panel::tile) {
            with_constant<Panel::tile>(job.tokens.count, [&]<int token_count>() { multiply_few<token_count>(job); });
        } else {
            ByPanels<L, Panel>::multiply(job);
        }
    }

private:
    template <int token_count>
    static void multiply_few(const Multiplication& job) {
        const CodeTokens x = code_tokens(job.tokens, 0, 0);
        const std::int64_t group_bytes = Panel::group_bytes(job.tokens.columns);
        for (int group = job.first_group; group < job.last_group; ++group) {
            L sums[token_count];
            for (L& sum : sums) {
                sum = L::zero();
            }
            add_code_products<L, typename Panel::Packed>(job.storage + group * group_bytes, x.block_stride, x, sums);
            for (int t = 0; t < token_count; ++t) {
                store_sums(sums[t], job, group, t);
            }
        }
    }
};

// One token by float weights: several groups at once, since one group's sums would wait for each other.
template <typename L, Element element>
struct ByFloats {
    using Columns = FloatColumns<L, element>;

    static void multiply(const Multiplication& job) {
        if (job.tokens.count > 1) {
            return ByPanels<L, ValuePanel<L, Columns>>::multiply(job);
        }
        int group = job.first_group;
        for (; group + L::groups_at_once <= job.last_group; group += L::groups_at_once) {
            multiply_groups<L::groups_at_once>(job, group);
        }
        for (; group < job.last_group; ++group) {
            multiply_groups<1>(job, group);
        }
    }

private:
    template <int group_count>
    static void multiply_groups(const Multiplication& job, int first_group) {
        const std::int64_t group_bytes = Columns::group_bytes(job.tokens.columns);
        L sums[group_count][1];
        for (auto& sum : sums) {
            sum[0] = L::zero();
        }
        add_value_products<L, element>(job.storage + first_group * group_bytes, group_bytes, job.tokens.columns,
                                       job.tokens.values, 0, sums);
        for (int g = 0; g < group_count; ++g) {
            store_sums(sums[g][0], job, first_group + g, 0);
        }
    }
};

// See quantize_token.
template <typename L>
struct QuantizeToken {
    static void run(const float* values, int columns, std::int8_t* codes, float* scales, float* sums) {
        for (int b = 0; b < columns / block_columns; ++b) {
            quantize_block(values + b * block_columns, codes + b * block_columns, scales[b], sums[b]);
        }
    }

private:
    static QUANTLAB_INLINE void quantize_block(const float* values, std::int8_t* codes, float& scale, float& sum) {
        const L low = L::load(values);
        const L high = L::load(values + 16);
        scale = L::max(L::abs(low), L::abs(high)).fold_max() / 127.0f;
        // A finite number less itself is zero; infinity and NaN give NaN.
        const bool is_finite = ((low - low) + (high - high)).fold_sum() == 0.0f;
        const float inverse = is_finite ? inverse_of(scale) : 0.0f;
        const L low_codes = is_finite ? L::round(low * L::broadcast(inverse)) : L::zero();
        const L high_codes = is_finite ? L::round(high * L::broadcast(inverse)) : L::zero();
        low_codes.store_int8(codes);
        high_codes.store_int8(codes + 16);
        scale = is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
        sum = scale * (low_codes + high_codes).fold_sum();
    }

    // Zero for scales whose inverse is beyond fp32.
    static QUANTLAB_INLINE float inverse_of(float scale) {
        const float inverse = 1.0f / scale;
        return inverse <= std::numeric_limits<float>::max() ? inverse : 0.0f;
    }
};

template <typename L>
constexpr MatmulKernel matmul_kernel_of() {
    MatmulKernel kernel{};
    const auto set_floats = [&kernel]<Element element>(WeightType type) {
        kernel.by_values[static_cast<int>(type)] = ByFloats<L, element>::multiply;
    };
    const auto set_blocks = [&kernel]<typename File>(WeightType type, const File*) {
        using Layout = BlockLayout<File>;
        kernel.by_values[static_cast<int>(type)] = ByPanels<L, ValuePanel<L, BlockColumns<L, Layout>>>::multiply;
        kernel.by_codes[static_cast<int>(type)] = ByCodes<L, Layout>::multiply;
    };
    set_floats.template operator()<Element::f32>(WeightType::f32);
    set_floats.template operator()<Element::f16>(WeightType::f16);
    set_floats.template operator()<Element::bf16>(WeightType::bf16);
    set_blocks(WeightType::q4_0, static_cast<const BlockQ4_0*>(nullptr));
    set_blocks(WeightType::q4_1, static_cast<const BlockQ4_1*>(nullptr));
    set_blocks(WeightType::q5_0, static_cast<const BlockQ5_0*>(nullptr));
    set_blocks(WeightType::q5_1, static_cast<const BlockQ5_1*>(nullptr));
    set_blocks(WeightType::q8_0, static_cast<const BlockQ8_0*>(nullptr));
    kernel.quantize_token = QuantizeToken<L>::run;
    return kernel;
}

}  // namespace quantlab::engine
