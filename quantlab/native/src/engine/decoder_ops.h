// What a decoder does beside multiplying by weights, in one variant for each instruction set.
//
// Written once over 16 lanes (decoder_ops_template.h). Lengths are multiples of 16. Every function's result is a
// function of its arguments alone, to the last bit: sums run in one fixed order.
#pragma once

#include "decoder_spec.h"

#include <cstdint>

namespace quantlab::engine {

// Positions are taken in chunks, counted from position 0, and the chunks' results merged in ascending order. So a query's
// attention is a function of its range of positions alone, whoever computes the chunks.
inline constexpr int attention_chunk = 512;

// Keys and values of a key head, in tiles of 16 positions (kv_cache.h).
struct CacheTiles {
    const std::uint8_t* keys;
    const std::uint8_t* values;
};

// Attention of `count` queries that share a key head, each over its positions first..last. The first `shared_tiles` tiles
// from position 0 on are one and the same for all; those behind are the queries' own, `own_queries` of them having some in
// common.
struct AttentionTask {
    const float* const* queries;  // [count], of head_size
    const int* first;             // [count]
    const int* last;              // [count]
    int count;
    CacheTiles shared;
    int shared_tiles;
    const CacheTiles* own;  // [count / own_queries], from tile shared_tiles on; null where all is shared
    int own_queries;
    int head_size;
    float scale;
    float cap;       // soft cap of scores, 0 for none
    float* scores;   // scratch, [count][attention_chunk]
    bool multiplied;  // whether scores holds the products of queries and keys already
    float* decoded;  // scratch, [head_size][16]
    float* folded;   // scratch, [count][16]
};

// Softmax under way: of the positions so far the largest score (-infinity before any), the sum of the weights
// w = e^(score - largest), and the sum of w * value.
struct AttentionState {
    float* largest;  // [count]
    float* sums;     // [count]
    float* values;   // [count][head_size]
};

struct DecoderOps {
    void (*rms_norm)(const float* x, const float* weight, int n, float epsilon, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float epsilon, float* out);
    void (*add)(float* x, const float* y, int n);
    void (*scale)(float* x, float factor, int n);
    void (*cap)(float* x, float cap, int n);
    void (*rotate)(float* head, const float* cosines, const float* sines, int half);
    // out = act(gate) * up, or act(gate) where up is null; out may be gate.
    void (*activate)(Activation activation, const float* gate, const float* up, int n, float* out);
    void (*store_key)(CacheType type, std::uint8_t* keys, int position, const float* key, int head_size);
    void (*store_value)(CacheType type, std::uint8_t* values, int position, const float* value, int head_size);
    // The state of positions [chunk * attention_chunk, (chunk + 1) * attention_chunk) alone.
    void (*attend_chunk)(CacheType type, const AttentionTask& task, int chunk, const AttentionState& state);
    void (*merge)(const AttentionState& into, const AttentionState& later, int count, int head_size);
    void (*finish)(const AttentionState& state, int count, int head_size, float* const* out);
    // products[r] = a[r] . x for `rank` rows of n floats, and y += b products for 16 rows of b at a time, [rank][16] each:
    // see decoder_adapters.h.
    void (*low_rank_products)(const float* a, int rank, const float* x, int n, float* products);
    void (*add_low_rank)(const float* b, int rank, const float* products, float* y, int n);
    // The sum of n floats, a multiple of 128, read as fast as this instruction set can.
    float (*sum)(const float* x, std::int64_t n);
};

const DecoderOps& scalar_decoder_ops();
const DecoderOps* avx2_decoder_ops();    // null where build or processor has none
const DecoderOps* avx512_decoder_ops();

// Those of the kernel that `cpu_kernel` names.
const DecoderOps& chosen_decoder_ops();

}  // namespace quantlab::engine
