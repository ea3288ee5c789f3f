// One pass of the decoder: up to pass_tokens tokens through all layers, by all threads.
//
// Threads split rows of matrices, so that every output has one author, and meet where one needs what others wrote. A
// thread whose query rows, key heads and attention outputs belong together goes through attention alone; likewise
// through the feed-forward part up to its activations. With few tokens each thread also computes the residual stream
// for itself. So a token costs four meetings a layer.
#include "decoder.h"

#include "decoder_scratch.h"

#include <algorithm>
#include <limits>

namespace quantlab::engine {

namespace {

// The part of [0, count) that thread `thread` of `threads` works on, in whole units.
Decoder::Range share(std::int64_t count, int thread, int threads, std::int64_t unit = 1) {
    const std::int64_t units = (count + unit - 1) / unit;
    const auto end = [&](int index) { return std::min(count, units * index / threads * unit); };
    return {end(thread), end(thread + 1)};
}

}  // namespace

void Decoder::run(const Pass& pass, const std::int32_t* tokens, float* logits, int wanted) {
    ResidualStream& stream = stream_of(pass);
    const int hidden = spec_.hidden;
    const Range mine = rows_of(pass, pass.count);
    for (auto t = mine.first; t < mine.last; ++t) {
        float* row = stream.x.data() + t * hidden;
        weights_.embedding->read_row(tokens[t], row);
        if (spec_.embedding_scale != 1.0f) ops_.scale(row, spec_.embedding_scale, hidden);
        if (weights_.positions != nullptr) {
            float* place = stream.update.data() + t * hidden;
            weights_.positions->read_row(position_ + t, place);
            ops_.add(row, place, hidden);
        }
    }
    for (int index = 0; index < spec_.layers; ++index) {
        attend(pass, index);
        feed_forward(pass, weights_.layers[index]);
    }
    if (wanted > 0) head(pass, logits, wanted);
}

void Decoder::head(const Pass& pass, float* logits, int wanted) {
    ResidualStream& stream = stream_of(pass);
    meet_unless_few(pass);
    const Range rows = rows_of(pass, wanted);
    for (auto t = rows.first; t < rows.last; ++t) {
        const float* row = stream.x.data() + (pass.count - wanted + t) * spec_.hidden;
        norm(weights_.final_norm, row, spec_.hidden, stream.attention_input.values.data() + t * spec_.hidden);
        quantize(stream.attention_input, spec_.hidden, t, {0, spec_.hidden});
    }
    meet_unless_few(pass);
    multiply_together(pass, weights_.head, tokens_of(stream.attention_input, wanted, spec_.hidden), logits);
    if (spec_.logit_cap == 0.0f && weights_.head.bias.empty()) return;
    pool_.barrier();
    const Range finished = share(wanted, pass.thread, pool_.size());
    for (auto t = finished.first; t < finished.last; ++t) {
        float* row = logits + t * spec_.vocabulary;
        add_bias(weights_.head, row, {0, spec_.vocabulary});
        if (spec_.logit_cap != 0.0f) cap_logits(row);
    }
}

void Decoder::cap_logits(float* row) const {
    alignas(64) float tail[16] = {};
    const int whole = spec_.vocabulary / 16 * 16;
    ops_.cap(row, spec_.logit_cap, whole);
    if (whole == spec_.vocabulary) return;
    std::copy(row + whole, row + spec_.vocabulary, tail);
    ops_.cap(tail, spec_.logit_cap, 16);
    std::copy(tail, tail + (spec_.vocabulary - whole), row + whole);
}

void Decoder::attend(const Pass& pass, int index) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    ResidualStream& stream = stream_of(pass);
    const int hidden = spec_.hidden, columns = spec_.heads * spec_.head_size;
    const Range mine = rows_of(pass, pass.count);
    for (auto t = mine.first; t < mine.last; ++t) {
        const float* row = stream.x.data() + t * hidden;
        norm(w.attention_norm, row, hidden, stream.attention_input.values.data() + t * hidden);
        if (spec_.parallel_residual) norm(w.inner_norm, row, hidden, stream.inner_input.values.data() + t * hidden);
        quantize(stream.attention_input, hidden, t, {0, hidden});
    }
    meet_unless_few(pass);
    const Tokens input = tokens_of(stream.attention_input, pass.count, hidden);
    const bool short_context = chunks_seen(pass, index).count == 1 || pool_.size() == 1;
    if (pass.few && heads_part() && short_context) {
        attend_alone(pass, index, input);
    } else {
        attend_together(pass, index, input);
    }
    pool_.barrier();
    multiply_together(pass, w.output, tokens_of(s.attended, pass.count, columns), s.sum.data());
    pool_.barrier();
    for (auto t = mine.first; t < mine.last; ++t) {
        add_to_stream(stream, t, w.output, w.attention_post_norm);
        float* ready = stream.inner_input.values.data() + t * hidden;
        if (!spec_.parallel_residual) norm(w.inner_norm, stream.x.data() + t * hidden, hidden, ready);
        quantize(stream.inner_input, hidden, t, {0, hidden});
    }
    meet_unless_few(pass);
}

void Decoder::feed_forward(const Pass& pass, const LayerWeights& w) {
    DecoderScratch& s = *scratch_;
    ResidualStream& stream = stream_of(pass);
    const int hidden = spec_.hidden, inner = spec_.inner;
    const Tokens input = tokens_of(stream.inner_input, pass.count, hidden);
    divide(pass, inner, [&](Range part) {
        if (spec_.gated) multiply(w.gate, input, s.gate.data(), part);
        multiply(w.up, input, s.inner.values.data(), part);
        for (std::int64_t t = 0; t < pass.count; ++t) {
            float* up = s.inner.values.data() + t * inner;
            float* gate = spec_.gated ? s.gate.data() + t * inner : nullptr;
            add_bias(w.up, up, part);
            if (gate != nullptr) add_bias(w.gate, gate, part);
            up += part.first;
            ops_.activate(spec_.activation, gate != nullptr ? gate + part.first : up, gate != nullptr ? up : nullptr,
                          static_cast<int>(part.last - part.first), up);
            quantize(s.inner, inner, t, part);
        }
    });
    pool_.barrier();
    multiply_together(pass, w.down, tokens_of(s.inner, pass.count, inner), s.sum.data());
    pool_.barrier();
    const Range mine = rows_of(pass, pass.count);
    for (auto t = mine.first; t < mine.last; ++t) add_to_stream(stream, t, w.down, w.inner_post_norm);
}

void Decoder::add_to_stream(ResidualStream& stream, std::int64_t token, const Linear& from, const NormWeights& post_norm) {
    const int hidden = spec_.hidden;
    const float* sum = scratch_->sum.data() + token * hidden;
    if (!from.bias.empty() || !post_norm.weight.empty()) {
        float* update = stream.update.data() + token * hidden;
        std::copy(sum, sum + hidden, update);
        add_bias(from, update, {0, hidden});
        if (!post_norm.weight.empty()) norm(post_norm, update, hidden, update);
        sum = update;
    }
    ops_.add(stream.x.data() + token * hidden, sum, hidden);
}

// Whether each thread has key heads of its own, as many as any other, in whole blocks of what attention gives.
bool Decoder::heads_part() const {
    const int threads = pool_.size();
    if (spec_.kv_heads % threads != 0) return false;
    return threads == 1 || spec_.heads / threads * spec_.head_size % block_columns == 0;
}

// Biases, norms and rotation of queries and keys; keys and values go to the cache.
void Decoder::prepare(int index, Range heads, Range tokens) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads, half = spec_.rotated / 2;
    const int table = spec_.rope_tables[index];
    for (auto t = tokens.first; t < tokens.last; ++t) {
        const std::int64_t at = position_ + t;
        const auto turn = [&](float* row, std::int64_t head, const Linear& linear, const NormWeights& head_norm) {
            float* values = row + head * size;
            if (!linear.bias.empty()) ops_.add(values, linear.bias.data() + head * size, size);
            if (!head_norm.weight.empty()) norm(head_norm, values, size, values);
            if (half == 0) return;
            ops_.rotate(values, weights_.cosines[table].data() + at * half, weights_.sines[table].data() + at * half, half);
        };
        float* query = s.query.data() + t * spec_.heads * size;
        float* key = s.key.data() + t * spec_.kv_heads * size;
        float* value = s.value.data() + t * spec_.kv_heads * size;
        for (auto head = heads.first; head < heads.last; ++head) {
            for (auto g = head * group; g < (head + 1) * group; ++g) turn(query, g, w.query, w.query_norm);
            turn(key, head, w.key, w.key_norm);
            if (!w.value.bias.empty()) ops_.add(value + head * size, w.value.bias.data() + head * size, size);
            const int place = static_cast<int>(at), kv = static_cast<int>(head);
            ops_.store_key(cache_type_, keys(index, kv), place, key + head * size, size);
            ops_.store_value(cache_type_, values(index, kv), place, value + head * size, size);
            if (!int8_scores()) continue;
            const std::int64_t to = query_place(head, t);
            kernel_.quantize_token(query + head * group * size, group * size, s.query_codes.data() + to,
                                   s.query_scales.data() + to / block_columns, s.query_sums.data() + to / block_columns);
        }
    }
}

// Where in query_codes the queries of a token and key head start.
std::int64_t Decoder::query_place(std::int64_t head, std::int64_t token) const {
    return (head * pass_tokens + token) * (spec_.heads / spec_.kv_heads) * spec_.head_size;
}

Decoder::Range Decoder::batch_at(const Pass& pass, int token) const {
    return {token, std::min(pass.count, token + batch_tokens())};
}

int Decoder::batch_tokens() const { return std::max(1, attention_queries / (spec_.heads / spec_.kv_heads)); }

// The attention of tokens' queries that share a key head.
AttentionTask Decoder::attention_task(int index, std::int64_t head, Range tokens, AttentionScratch& scratch) {
    DecoderScratch& s = *scratch_;
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads, window = spec_.windows[index];
    int count = 0;
    for (auto t = tokens.first; t < tokens.last; ++t) {
        const int last = position_ + static_cast<int>(t);
        for (auto g = head * group; g < (head + 1) * group; ++g, ++count) {
            const std::int64_t at = (t * spec_.heads + g) * size;
            scratch.queries[count] = s.query.data() + at;
            scratch.out[count] = s.attended.values.data() + at;
            scratch.first[count] = window == 0 ? 0 : std::max(0, last - window + 1);
            scratch.last[count] = last;
        }
    }
    const int kv = static_cast<int>(head);
    return {scratch.queries.data(), scratch.first.data(), scratch.last.data(), count, keys(index, kv), values(index, kv), size,
            spec_.attention_scale, spec_.attention_cap, scratch.scores.data(), false, scratch.decoded.data(),
            scratch.folded.data()};
}

// One chunk of positions. Keys in q8_0 are multiplied by int8 queries as the packed matrix that they are.
void Decoder::attend_chunk(int index, std::int64_t head, std::int64_t first_token, AttentionTask& task, int chunk,
                           const AttentionState& state) {
    if (int8_scores()) {
        const int start = chunk * attention_chunk, size = spec_.head_size;
        const int last = std::min(start + attention_chunk - 1, *std::max_element(task.last, task.last + task.count));
        const int first = std::max(start, *std::min_element(task.first, task.first + task.count));
        const std::int64_t place = query_place(head, first_token);
        const DecoderScratch& s = *scratch_;
        const Tokens queries{task.count, size, nullptr, s.query_codes.data() + place, s.query_scales.data() + place / block_columns,
                             s.query_sums.data() + place / block_columns};
        const auto tile = [&](int position) { return (position - start) / tile_positions; };
        kernel_.by_codes[static_cast<int>(WeightType::q8_0)](
            {task.keys + tile_bytes(cache_type_, size) * (start / tile_positions), attention_chunk, queries, task.scores,
             attention_chunk, tile(first), tile(last) + 1});
        task.multiplied = true;
    }
    ops_.attend_chunk(cache_type_, task, chunk, state);
}

void Decoder::attend_batch(int index, std::int64_t head, Range tokens, int thread) {
    AttentionScratch& scratch = scratch_->attention[thread];
    AttentionTask task = attention_task(index, head, tokens, scratch);
    const AttentionState merged = AttentionScratch::state(scratch.merged.data(), task.count);
    const AttentionState chunk = AttentionScratch::state(scratch.chunk.data(), task.count);
    std::fill(merged.largest, merged.largest + task.count, -std::numeric_limits<float>::infinity());
    for (int c = task.first[0] / attention_chunk; c <= task.last[task.count - 1] / attention_chunk; ++c) {
        attend_chunk(index, head, tokens.first, task, c, chunk);
        ops_.merge(merged, chunk, task.count, task.head_size);
    }
    ops_.finish(merged, task.count, task.head_size, scratch.out.data());
}

// The chunks of positions that a pass's tokens see.
Decoder::Chunks Decoder::chunks_seen(const Pass& pass, int index) const {
    const int window = spec_.windows[index];
    const int first = (window == 0 ? 0 : std::max(0, position_ - window + 1)) / attention_chunk;
    return {first, (position_ + pass.count - 1) / attention_chunk - first + 1};
}

// Few tokens in a short context: each thread goes from its key heads' rows to their attention by itself.
void Decoder::attend_alone(const Pass& pass, int index, const Tokens& input) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads;
    const Range heads = share(spec_.kv_heads, pass.thread, pool_.size());
    const Range keys{heads.first * size, heads.last * size}, queries{keys.first * group, keys.last * group};
    multiply(w.query, input, s.query.data(), queries);
    multiply(w.key, input, s.key.data(), keys);
    multiply(w.value, input, s.value.data(), keys);
    prepare(index, heads, {0, pass.count});
    for (auto head = heads.first; head < heads.last; ++head) {
        for (int t = 0; t < pass.count; t += batch_tokens()) attend_batch(index, head, batch_at(pass, t), pass.thread);
    }
    for (int t = 0; t < pass.count; ++t) quantize(s.attended, spec_.heads * size, t, queries);
}

void Decoder::attend_together(const Pass& pass, int index, const Tokens& input) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    multiply_together(pass, w.query, input, s.query.data());
    multiply_together(pass, w.key, input, s.key.data());
    multiply_together(pass, w.value, input, s.value.data());
    pool_.barrier();
    const Range units = share(static_cast<std::int64_t>(pass.count) * spec_.kv_heads, pass.thread, pool_.size());
    for (auto unit = units.first; unit < units.last; ++unit) {
        const std::int64_t t = unit / spec_.kv_heads, head = unit % spec_.kv_heads;
        prepare(index, {head, head + 1}, {t, t + 1});
    }
    pool_.barrier();
    if (pass.few && chunks_seen(pass, index).count > 1 && pool_.size() > 1) {
        attend_chunks(pass, index);
    } else {
        const int batches = (pass.count + batch_tokens() - 1) / batch_tokens();
        pool_.divide(pass.thread, batches * spec_.kv_heads, [&](std::int64_t part) {
            attend_batch(index, part / batches, batch_at(pass, static_cast<int>(part % batches) * batch_tokens()), pass.thread);
        });
    }
    pool_.barrier();
    const int columns = spec_.heads * spec_.head_size;
    const Range mine = share(columns, pass.thread, pool_.size(), block_columns);
    for (int t = 0; t < pass.count; ++t) quantize(s.attended, columns, t, mine);
}

// A long context and few tokens: threads share the chunks of positions.
void Decoder::attend_chunks(const Pass& pass, int index) {
    const Chunks chunks = chunks_seen(pass, index);
    AttentionScratch& scratch = scratch_->attention[pass.thread];
    const int count = pass.count * (spec_.heads / spec_.kv_heads), size = spec_.head_size;
    const std::size_t floats = AttentionScratch::state_floats(count, size);
    const auto state = [&](int head, int chunk) {
        const std::size_t place = static_cast<std::size_t>(head) * chunks.count + chunk;
        return AttentionScratch::state(scratch_->chunk_states.data() + place * floats, count);
    };
    pool_.divide(pass.thread, spec_.kv_heads * chunks.count, [&](std::int64_t part) {
        const int head = static_cast<int>(part) / chunks.count, chunk = static_cast<int>(part) % chunks.count;
        AttentionTask task = attention_task(index, head, {0, pass.count}, scratch);
        attend_chunk(index, head, 0, task, chunks.first + chunk, state(head, chunk));
    });
    pool_.barrier();
    for (int head = pass.thread; head < spec_.kv_heads; head += pool_.size()) {
        const AttentionState merged = AttentionScratch::state(scratch.merged.data(), count);
        std::fill(merged.largest, merged.largest + count, -std::numeric_limits<float>::infinity());
        for (int chunk = 0; chunk < chunks.count; ++chunk) ops_.merge(merged, state(head, chunk), count, size);
        attention_task(index, head, {0, pass.count}, scratch);
        ops_.finish(merged, count, size, scratch.out.data());
    }
}

ResidualStream& Decoder::stream_of(const Pass& pass) {
    return pass.few ? scratch_->threads[pass.thread] : scratch_->shared;
}

Decoder::Range Decoder::rows_of(const Pass& pass, int count) const {
    return pass.few ? Range{0, count} : share(count, pass.thread, pool_.size());
}

void Decoder::meet_unless_few(const Pass& pass) {
    if (!pass.few) pool_.barrier();
}

void Decoder::norm(const NormWeights& weights, const float* x, int n, float* out) const {
    if (spec_.norm == Norm::layer) {
        ops_.layer_norm(x, weights.weight.data(), weights.bias.data(), n, spec_.epsilon, out);
    } else {
        ops_.rms_norm(x, weights.weight.data(), n, spec_.epsilon, out);
    }
}

// Calls work(rows) for parts of `count` rows, by all threads.
template <typename Work>
void Decoder::divide(const Pass& pass, std::int64_t count, const Work& work) {
    pool_.divide(pass.thread, (count + divided_rows - 1) / divided_rows, [&](std::int64_t part) {
        work(Range{part * divided_rows, std::min(count, (part + 1) * divided_rows)});
    });
}

// All rows of the matrix, by all threads.
void Decoder::multiply_together(const Pass& pass, const Linear& linear, const Tokens& x, float* out) {
    divide(pass, linear.weight->rows(), [&](Range rows) { multiply(linear, x, out, rows); });
}

// Rows first to last - 1 of the matrix, for all tokens; first is a multiple of group_rows.
void Decoder::multiply(const Linear& linear, const Tokens& x, float* out, Range rows) const {
    const auto groups = [](std::int64_t row) { return static_cast<int>((row + group_rows - 1) / group_rows); };
    linear.weight->multiply(x, out, linear.weight->rows(), groups(rows.first), groups(rows.last));
}

// Columns that int8 activations need, of one token.
void Decoder::quantize(Activations& x, int columns, std::int64_t token, Range part) const {
    if (!int8_ || columns % block_columns != 0 || part.first == part.last) return;
    const std::int64_t at = token * columns + part.first;
    kernel_.quantize_token(x.values.data() + at, static_cast<int>(part.last - part.first), x.codes.data() + at,
                           x.scales.data() + at / block_columns, x.sums.data() + at / block_columns);
}

// Columns from a multiple of 16 on.
void Decoder::add_bias(const Linear& linear, float* row, Range part) const {
    if (linear.bias.empty()) return;
    const auto whole = static_cast<int>((part.last - part.first) / 16 * 16);
    ops_.add(row + part.first, linear.bias.data() + part.first, whole);
    for (auto i = part.first + whole; i < part.last; ++i) row[i] += linear.bias[i];
}

Tokens Decoder::tokens_of(const Activations& x, int count, int columns) const {
    const bool coded = int8_ && columns % block_columns == 0;
    return {count, columns, x.values.data(), coded ? x.codes.data() : nullptr, x.scales.data(), x.sums.data()};
}

std::uint8_t* Decoder::keys(int layer, int kv_head) {
    return key_cache_.get() + (static_cast<std::size_t>(layer) * spec_.kv_heads + kv_head) * head_bytes_;
}

std::uint8_t* Decoder::values(int layer, int kv_head) {
    return value_cache_.get() + (static_cast<std::size_t>(layer) * spec_.kv_heads + kv_head) * head_bytes_;
}

}  // namespace quantlab::engine
