// A transformer decoder over packed weights, described by data; one sequence, one cache.
#pragma once

#include "decoder_adapters.h"
#include "decoder_ops.h"
#include "decoder_spec.h"
#include "decoder_weights.h"
#include "kv_cache.h"
#include "matmul_kernel.h"
#include "thread_pool.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

namespace quantlab::engine {

struct Activations;
struct AttentionScratch;
struct DecoderScratch;
struct ResidualStream;

class Decoder {
public:
    // Throws std::invalid_argument where spec, weights and arguments disagree, naming what.
    Decoder(DecoderSpec spec, DecoderWeights weights, int context, CacheType cache, bool int8_activations, int threads);
    ~Decoder();

    // Appends `count` tokens to the sequence. `logits` takes the `wanted` last tokens', [wanted][vocabulary].
    // Throws std::invalid_argument for an id out of range or a context that is full; the sequence is unchanged then.
    //
    // This and all other calls: std::runtime_error while another thread is in one.
    void append(const std::int32_t* tokens, int count, float* logits, int wanted);

    int position() const;
    int context() const { return context_; }
    const DecoderSpec& spec() const { return spec_; }

    // Takes these adapters, one entry a layer (none: no adapters), for those it had, and forgets all tokens, whose keys
    // and values were computed with the old ones. Throws std::invalid_argument where they do not fit, changing nothing.
    void set_adapters(std::vector<LayerAdapters> adapters);

    // Forgets all tokens from `position` on.
    void rewind(int position);

    // The cache of the tokens so far as plain bytes, independent of `context`, and back. `size` of `bytes` must be
    // cache_bytes(positions); std::invalid_argument if it is not, or the context holds fewer positions.
    std::size_t cache_bytes(int positions) const;
    void export_cache(std::uint8_t* bytes, std::size_t size) const;
    void import_cache(const std::uint8_t* bytes, std::size_t size, int positions);

    // From first to last - 1.
    struct Range {
        std::int64_t first, last;
    };

private:
    // Tokens on their way through the layers, seen by one of the threads.
    struct Pass {
        int count;
        bool few;  // each thread keeps the residual stream for itself
        int thread;
    };

    // What multiplications read: tokens, and their products with the adapters, [tokens][rank].
    struct Input {
        Tokens tokens;
        const float* products;
        int rank;
    };

    // The matrices that read an input.
    using Readers = std::initializer_list<const Linear*>;

    // Runs of positions that attention takes at once (decoder_ops.h).
    struct Chunks {
        int first, count;
    };

    void check_size(std::size_t size, int positions) const;

    // decoder_pass.cpp
    void run(const Pass& pass, const std::int32_t* tokens, float* logits, int wanted);
    void head(const Pass& pass, float* logits, int wanted);
    void cap_logits(float* row) const;
    void feed_forward(const Pass& pass, int index);
    void add_to_stream(ResidualStream& stream, std::int64_t token, const Linear& from, const NormWeights& post_norm);
    ResidualStream& stream_of(const Pass& pass);
    Range rows_of(const Pass& pass, int count) const;
    void meet_unless_few(const Pass& pass);
    void norm(const NormWeights& weights, const float* x, int n, float* out) const;
    template <typename Work>
    void divide(const Pass& pass, std::int64_t count, const Work& work);
    void multiply_together(const Pass& pass, const Linear& linear, const LowRankRows& update, const Input& x, float* out);
    void multiply(const Linear& linear, const LowRankRows& update, const Input& x, float* out, Range rows) const;
    bool divides_products(const Pass& pass, const LowRankInput& adapter, int columns) const;
    float* products_of(const Pass& pass, const LowRankInput& adapter, int columns) const;
    void take_products(const Pass& pass, const LowRankInput& adapter, const Activations& x, int columns);
    void meet_if_divided(const Pass& pass, const LowRankInput& adapter, int columns);
    void take_input(const Pass& pass, const LowRankInput& adapter, Activations& x, int columns, const Linear& reader);
    bool wants_codes(ActivationScheme scheme, Readers readers) const;
    void quantize(const Pass& pass, Activations& x, int columns, std::int64_t token, Readers readers);
    void quantize_part(Activations& x, int columns, std::int64_t token, Range part, Readers readers) const;
    void quantize_row(const Pass& pass, const Activations& x, int columns, std::int64_t token, Readers readers);
    void add_bias(const Linear& linear, float* row, Range part) const;
    Tokens tokens_of(const Pass& pass, const Activations& x, int count, int columns);
    Input input_of(const Pass& pass, const LowRankInput& adapter, const Activations& x, int columns);

    // decoder_attention.cpp
    void attend(const Pass& pass, int index);
    bool heads_part() const;
    void prepare(int index, Range heads, Range tokens);
    int batch_tokens() const;
    Range batch_at(const Pass& pass, int token) const;
    AttentionTask attention_task(int index, std::int64_t head, Range tokens, AttentionScratch& scratch);
    void attend_batch(int index, std::int64_t head, Range tokens, int thread);
    bool int8_scores() const { return int8_ && cache_type_ == CacheType::q8_0; }
    std::int64_t query_place(std::int64_t head, std::int64_t token) const;
    void attend_chunk(int index, std::int64_t head, std::int64_t first_token, AttentionTask& task, int chunk,
                      const AttentionState& state);
    Chunks chunks_seen(const Pass& pass, int index) const;
    void attend_alone(const Pass& pass, int index, const Input& input);
    void attend_together(const Pass& pass, int index, const Input& input);
    void attend_chunks(const Pass& pass, int index);
    std::uint8_t* keys(int layer, int kv_head);
    std::uint8_t* values(int layer, int kv_head);

    DecoderSpec spec_;
    DecoderWeights weights_;
    std::vector<LayerAdapters> adapters_;  // one a layer
    int context_;
    CacheType cache_type_;
    bool int8_;
    const DecoderOps& ops_;
    const MatmulKernel& kernel_;
    mutable ThreadPool pool_;
    mutable std::atomic<bool> used_ = false;
    int position_ = 0;
    std::size_t head_bytes_ = 0;
    Storage key_cache_, value_cache_;
    std::unique_ptr<DecoderScratch> scratch_;
};

}  // namespace quantlab::engine
