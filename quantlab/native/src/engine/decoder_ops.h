// What a decoder does beside multiplying by weights, in one variant for each instruction set.
//
// Written once over 16 lanes (decoder_ops_template.h). Lengths are multiples of 16. Every function's result is a
// function of its arguments alone, to the last bit: sums run in one fixed order.
#pragma once

#include "decoder_spec.h"

#include <cstdint>

namespace quantlab::engine {

// One token's attention in the `group` query heads that share a key head.
struct AttentionTask {
    const float* queries;        // [group][head_size]
    float* out;                  // [group][head_size]
    const std::uint8_t* keys;    // tiles from position 0
    const std::uint8_t* values;  // rows from position 0
    int first;                   // positions first..last are attended to
    int last;
    int head_size;
    int group;
    float scale;
    float cap;
    float* scores;  // scratch, [group][score_stride], aligned to 64 bytes
    int score_stride;
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
    void (*attend)(CacheType type, const AttentionTask& task);
    // The sum of n floats, a multiple of 128, read as fast as this instruction set can.
    float (*sum)(const float* x, std::int64_t n);
};

const DecoderOps& scalar_decoder_ops();
const DecoderOps* avx2_decoder_ops();    // null where build or processor has none
const DecoderOps* avx512_decoder_ops();

// Those of the kernel that `cpu_kernel` names.
const DecoderOps& chosen_decoder_ops();

}  // namespace quantlab::engine
