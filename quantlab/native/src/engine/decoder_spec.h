// What a decoder computes, as data: one description for every family of models.
#pragma once

#include <cstdint>
#include <vector>

namespace quantlab::engine {

enum class Norm : int { rms, layer };
enum class Activation : int { silu, gelu_tanh, gelu_erf };
enum class CacheType : int { f32, f16, q8_0 };

struct DecoderSpec {
    int layers = 0;
    int hidden = 0;
    int heads = 0;
    int kv_heads = 0;
    int head_size = 0;
    int inner = 0;
    int vocabulary = 0;
    Norm norm = Norm::rms;
    float epsilon = 1e-5f;
    Activation activation = Activation::silu;
    bool gated = true;              // act(gate) * up instead of act(up)
    bool parallel_residual = false; // attention and feed-forward both read the layer's input
    int rotated = 0;                // columns of each head that the rotary embedding turns, 0 for none
    float embedding_scale = 1.0f;
    float attention_scale = 1.0f;
    float attention_cap = 0.0f;     // soft cap, 0 for none
    float logit_cap = 0.0f;
    std::vector<int> windows;       // per layer, 0 for attention to everything
    std::vector<int> rope_tables;   // per layer, which of the tables of cosines and sines
};

}  // namespace quantlab::engine
