// What a decoder's passes need besides weights and cache. Rows are tokens.
#pragma once

#include "decoder_ops.h"
#include "packed_matrix.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantlab::engine {

inline constexpr int pass_tokens = 64;  // at a time: unpacked weights are used for all, and activations stay in cache
// Up to so many tokens every thread keeps the residual stream for itself: computing it again costs less than meeting.
inline constexpr int few_tokens = 4;
// Few tokens' products with adapters are divided among threads from so many multiply-adds on: a meeting costs as much.
inline constexpr int least_divided_products = 1 << 16;
inline constexpr int divided_rows = 64;  // of a matrix, that a thread takes at a time (all `code_groups` of the kernels)
inline constexpr int attention_queries = 64;  // at a time: decoded keys and values are used for all

// What a multiplication reads.
struct Activations {
    std::vector<float> values;
    std::vector<std::int8_t> codes;
    std::vector<float> scales, sums;

    Activations() = default;
    Activations(int tokens, int columns)
        : values(static_cast<std::size_t>(tokens) * columns), codes(values.size()),
          scales(values.size() / block_columns + 1), sums(scales.size()) {}
};

// An input in int8 with one scale a token, for weights that want it so: of the input at hand, whichever that is.
struct RowCodes {
    std::vector<std::int8_t> codes;
    std::vector<float> scales, sums;

    RowCodes() = default;
    RowCodes(int tokens, int columns)
        : codes(static_cast<std::size_t>(tokens) * columns), scales(static_cast<std::size_t>(tokens)),
          sums(codes.size() / ternary_columns) {}
};

struct ResidualStream {
    std::vector<float> x, update;  // update: what a layer adds to x, if it needs work before
    Activations attention_input, inner_input;
    RowCodes row_codes;           // of the widest input that ternary weights read; empty without such weights
    std::vector<float> products;  // of adapters with the input at hand, [tokens][rank] (Decoder::set_adapters)

    ResidualStream() = default;
    ResidualStream(int tokens, int hidden, int coded_columns)
        : x(static_cast<std::size_t>(tokens) * hidden), update(x.size()), attention_input(tokens, hidden),
          inner_input(tokens, hidden), row_codes(tokens, coded_columns) {}
};

// One thread's, for attention.
struct AttentionScratch {
    std::vector<const float*> queries;
    std::vector<float*> out;
    std::vector<int> first, last;
    std::vector<CacheTiles> own;  // of branches
    std::vector<float> scores, decoded, folded;
    std::vector<float> merged, chunk;  // states: largest, sums, values

    AttentionScratch() = default;
    AttentionScratch(int count, int head_size)
        : queries(count), out(count), first(count), last(count), own(count),
          scores(static_cast<std::size_t>(count) * attention_chunk),
          decoded(static_cast<std::size_t>(head_size) * 16), folded(static_cast<std::size_t>(count) * 16),
          merged(state_floats(count, head_size)), chunk(merged.size()) {}

    static std::size_t state_floats(int count, int head_size) { return static_cast<std::size_t>(count) * (head_size + 2); }

    static AttentionState state(float* floats, int count) { return {floats, floats + count, floats + 2 * count}; }
};

struct DecoderScratch {
    ResidualStream shared;                // for many tokens: threads take different ones
    std::vector<ResidualStream> threads;  // for few
    std::vector<float> query, key, value, sum, gate;
    // Of queries, for q8_0 keys: [key head][pass_tokens][query heads that share it][head_size].
    std::vector<std::int8_t> query_codes;
    std::vector<float> query_scales, query_sums;
    Activations attended, inner;
    std::vector<AttentionScratch> attention;  // per thread
    std::vector<float> chunk_states;          // of few tokens' attention, where threads share heads' chunks
};

}  // namespace quantlab::engine
