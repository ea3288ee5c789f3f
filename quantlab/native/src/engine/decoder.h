// A transformer decoder over packed weights, described by data; one sequence, one cache.
#pragma once

#include "decoder_ops.h"
#include "decoder_spec.h"
#include "kv_cache.h"
#include "matmul_kernel.h"
#include "packed_matrix.h"
#include "thread_pool.h"

#include <cstdint>
#include <memory>
#include <vector>

namespace quantlab::engine {

// A matrix and the bias of its rows, which may be empty.
struct Linear {
    std::shared_ptr<const PackedMatrix> weight;
    std::vector<float> bias;
};

struct NormWeights {
    std::vector<float> weight;  // empty where the model has no such norm
    std::vector<float> bias;
};

struct LayerWeights {
    NormWeights attention_norm, query_norm, key_norm, attention_post_norm, inner_norm, inner_post_norm;
    Linear query, key, value, output, gate, up, down;
};

struct DecoderWeights {
    std::shared_ptr<const PackedMatrix> embedding, positions;  // positions: null without a learned table
    std::vector<LayerWeights> layers;
    NormWeights final_norm;
    Linear head;
    std::vector<std::vector<float>> cosines, sines;  // tables, [context][rotated / 2] each
};

class Decoder {
public:
    // Throws std::invalid_argument where spec, weights and arguments disagree, naming what.
    Decoder(DecoderSpec spec, DecoderWeights weights, int context, CacheType cache, bool int8_activations, int threads);

    // Appends `count` tokens to the sequence. `logits` takes the `wanted` last tokens', [wanted][vocabulary].
    // Throws std::invalid_argument for an id out of range or a context that is full; the sequence is unchanged then.
    void append(const std::int32_t* tokens, int count, float* logits, int wanted);

    int position() const { return position_; }
    int context() const { return context_; }
    const DecoderSpec& spec() const { return spec_; }

    // Forgets all tokens from `position` on.
    void rewind(int position);

    // The cache of the tokens so far as plain bytes, independent of `context`, and back.
    std::size_t cache_bytes(int positions) const;
    void export_cache(std::uint8_t* bytes) const;
    void import_cache(const std::uint8_t* bytes, int positions);

private:
    struct Scratch;

    void check() const;
    void run(const std::int32_t* tokens, int count, float* logits, int wanted, int thread);
    void layer(int index, int count, int thread);
    void attention(int index, int count, int thread);
    void norm(const NormWeights& weights, const float* x, int n, float* out) const;
    void multiply(const Linear& linear, const Tokens& x, float* out, int thread) const;
    void add_bias(const Linear& linear, float* row) const;
    Tokens tokens_of(const std::vector<float>& values, int count, int columns) const;
    std::uint8_t* keys(int layer, int kv_head);
    std::uint8_t* values(int layer, int kv_head);

    DecoderSpec spec_;
    DecoderWeights weights_;
    int context_;
    CacheType cache_type_;
    bool int8_;
    const DecoderOps& ops_;
    const MatmulKernel& kernel_;
    mutable ThreadPool pool_;
    int position_ = 0;
    std::size_t head_bytes_ = 0;
    std::vector<std::uint8_t> key_cache_, value_cache_;
    std::shared_ptr<Scratch> scratch_;
};

}  // namespace quantlab::engine
