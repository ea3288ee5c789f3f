// A transformer decoder over packed weights, described by data; one sequence, one cache, and branches of the sequence.
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

    // Begins `count` continuations of the sequence as it stands, in place of those it had, each with room for `room`
    // tokens. The sequence's keys and values serve all of them; what is copied are those of its last tile, if that is not
    // full. Branches last until end_branches or until the sequence changes.
    // Throws std::invalid_argument where the context has no such room, std::bad_alloc.
    void begin_branches(int count, int room);
    void end_branches();

    // Bytes that such branches take.
    std::size_t branch_bytes(int count, int room) const;

    // Appends tokens[i] to the branch branches[i], different ones, in passes of all together. `logits`, [count][vocabulary],
    // are the bits that the sequence would give, were it continued so.
    // Throws std::invalid_argument for an id out of range or a branch that is not there or full; all are unchanged then.
    void append_to_branches(const std::int32_t* tokens, const std::int32_t* branches, int count, float* logits);

    // The cache of tokens first .. last - 1 as plain bytes, independent of `context`, and back: the sequence then has
    // `last` tokens, of which it keeps those before `first`. `first` is a multiple of tile_positions, `size` of `bytes`
    // cache_bytes(last - first); std::invalid_argument if they are not, if the sequence lacks such tokens (before
    // `first`, to import), or if the context holds fewer than `last`.
    std::size_t cache_bytes(int positions) const;
    void export_cache(std::uint8_t* bytes, std::size_t size, int first, int last) const;
    void import_cache(const std::uint8_t* bytes, std::size_t size, int first, int last);

    // From first to last - 1.
    struct Range {
        std::int64_t first, last;
    };

private:
    // A continuation of the sequence: keys and values from tile shared_tiles() on, [layer][key head].
    struct Branch {
        int position;
        Storage keys, values;
    };

    // Tokens on their way through the layers, seen by one of the threads.
    struct Pass {
        int count;
        bool few;  // each thread keeps the residual stream for itself
        int thread;
        const std::int32_t* branches;  // of which each token continues one; null: all continue the sequence
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

    void check_token(std::int32_t token) const;
    void check_part(std::size_t size, int first, int last, int most_first) const;

    // decoder_branches.cpp
    void check_branches(const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& branches) const;
    Branch new_branch(int room) const;
    int shared_tiles() const { return position_ / tile_positions; }
    std::size_t branch_head_bytes(int room) const;
    int position_of(const Pass& pass, std::int64_t token) const;
    CacheTiles own_tiles(const Pass& pass, std::int64_t token, std::size_t head) const;
    void store(const Pass& pass, std::int64_t token, std::size_t head, const float* key, const float* value);

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
    void prepare(const Pass& pass, int index, Range heads, Range tokens);
    int batch_tokens() const;
    Range batch_at(const Pass& pass, int token) const;
    AttentionTask attention_task(const Pass& pass, int index, std::int64_t head, Range tokens, AttentionScratch& scratch);
    void attend_batch(const Pass& pass, int index, std::int64_t head, Range tokens);
    bool int8_scores() const { return int8_ && cache_type_ == CacheType::q8_0; }
    std::int64_t query_place(std::int64_t head, std::int64_t token) const;
    void attend_chunk(std::int64_t head, std::int64_t first_token, AttentionTask& task, int chunk,
                      const AttentionState& state);
    void multiply_keys(std::int64_t head, std::int64_t first_token, const AttentionTask& task, int chunk) const;
    Chunks chunks_seen(const Pass& pass, int index) const;
    void attend_alone(const Pass& pass, int index, const Input& input);
    void attend_together(const Pass& pass, int index, const Input& input);
    void attend_chunks(const Pass& pass, int index);
    std::size_t cached_head(int layer, std::int64_t kv_head) const;

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
    std::vector<Branch> branches_;
    int branch_room_ = 0;
    std::unique_ptr<DecoderScratch> scratch_;
};

}  // namespace quantlab::engine
