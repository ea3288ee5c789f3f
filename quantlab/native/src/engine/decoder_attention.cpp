// Attention in a pass: queries, keys and values of a layer, the cache, and what the heads give.
#include "decoder.h"

#include "decoder_parts.h"

#include <algorithm>
#include <limits>

namespace quantlab::engine {

void Decoder::attend(const Pass& pass, int index) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const LayerAdapters& a = adapters_[index];
    ResidualStream& stream = stream_of(pass);
    const int hidden = spec_.hidden, columns = spec_.heads * spec_.head_size;
    const Range mine = rows_of(pass, pass.count);
    for (auto t = mine.first; t < mine.last; ++t) {
        const float* row = stream.x.data() + t * hidden;
        norm(w.attention_norm, row, hidden, stream.attention_input.values.data() + t * hidden);
        if (spec_.parallel_residual) norm(w.inner_norm, row, hidden, stream.inner_input.values.data() + t * hidden);
        quantize(pass, stream.attention_input, hidden, t, {&w.query, &w.key, &w.value});
    }
    take_products(pass, a.attention, stream.attention_input, hidden);
    meet_unless_few(pass);
    meet_if_divided(pass, a.attention, hidden);
    const Input input = input_of(pass, a.attention, stream.attention_input, hidden);
    const bool short_context = chunks_seen(pass, index).count == 1 || pool_.size() == 1;
    if (pass.few && heads_part() && short_context) {
        attend_alone(pass, index, input);
    } else {
        attend_together(pass, index, input);
    }
    pool_.barrier();
    take_input(pass, a.output, s.attended, columns, w.output);
    multiply_together(pass, w.output, a.output_rows, input_of(pass, a.output, s.attended, columns), s.sum.data());
    pool_.barrier();
    for (auto t = mine.first; t < mine.last; ++t) {
        add_to_stream(stream, t, w.output, w.attention_post_norm);
        float* ready = stream.inner_input.values.data() + t * hidden;
        if (!spec_.parallel_residual) norm(w.inner_norm, stream.x.data() + t * hidden, hidden, ready);
        quantize(pass, stream.inner_input, hidden, t, {&w.gate, &w.up});
    }
    take_products(pass, a.inner, stream.inner_input, hidden);
    meet_unless_few(pass);
    meet_if_divided(pass, a.inner, hidden);
}

// Whether each thread has key heads of its own, as many as any other, in whole blocks of what attention gives.
bool Decoder::heads_part() const {
    const int threads = pool_.size();
    if (spec_.kv_heads % threads != 0) return false;
    return threads == 1 || spec_.heads / threads * spec_.head_size % block_columns == 0;
}

// Biases, norms and rotation of queries and keys; keys and values go to the cache.
void Decoder::prepare(const Pass& pass, int index, Range heads, Range tokens) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads, half = spec_.rotated / 2;
    const int table = spec_.rope_tables[index];
    for (auto t = tokens.first; t < tokens.last; ++t) {
        const std::int64_t at = position_of(pass, t);
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
            store(pass, t, cached_head(index, head), key + head * size, value + head * size);
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
AttentionTask Decoder::attention_task(const Pass& pass, int index, std::int64_t head, Range tokens,
                                      AttentionScratch& scratch) {
    DecoderScratch& s = *scratch_;
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads, window = spec_.windows[index];
    const bool own = pass.branches != nullptr;
    int count = 0;
    for (auto t = tokens.first; t < tokens.last; ++t) {
        const int last = position_of(pass, t);
        if (own) scratch.own[static_cast<std::size_t>(t - tokens.first)] = own_tiles(pass, t, cached_head(index, head));
        for (auto g = head * group; g < (head + 1) * group; ++g, ++count) {
            const std::int64_t at = (t * spec_.heads + g) * size;
            scratch.queries[count] = s.query.data() + at;
            scratch.out[count] = s.attended.values.data() + at;
            scratch.first[count] = window == 0 ? 0 : std::max(0, last - window + 1);
            scratch.last[count] = last;
        }
    }
    const std::size_t place = cached_head(index, head) * head_bytes_;
    const CacheTiles shared{key_cache_.get() + place, value_cache_.get() + place};
    return {scratch.queries.data(), scratch.first.data(), scratch.last.data(), count, shared,
            own ? shared_tiles() : std::numeric_limits<int>::max(), own ? scratch.own.data() : nullptr, group, size,
            spec_.attention_scale, spec_.attention_cap, scratch.scores.data(), false, scratch.decoded.data(),
            scratch.folded.data()};
}

// One chunk of positions. Keys in q8_0 are multiplied by int8 queries as the packed matrix that they are.
void Decoder::attend_chunk(std::int64_t head, std::int64_t first_token, AttentionTask& task, int chunk,
                           const AttentionState& state) {
    if (int8_scores()) {
        multiply_keys(head, first_token, task, chunk);
        task.multiplied = true;
    }
    ops_.attend_chunk(cache_type_, task, chunk, state);
}

// Of a chunk, as far as any query sees it: of shared keys all queries' products, of a branch's keys its own queries'.
void Decoder::multiply_keys(std::int64_t head, std::int64_t first_token, const AttentionTask& task, int chunk) const {
    constexpr int chunk_tiles = attention_chunk / tile_positions;
    const int start = chunk * chunk_tiles, size = spec_.head_size;
    const int first = *std::min_element(task.first, task.first + task.count) / tile_positions;
    const int last = *std::max_element(task.last, task.last + task.count) / tile_positions;
    const int begin = std::max(start, first), end = std::min(start + chunk_tiles, last + 1);  // tiles
    // Tiles begin .. end - 1 of keys that start with tile `origin`, by `count` queries from query `query` on.
    const auto multiply = [&](const std::uint8_t* keys, int origin, int begin, int end, int query, int count) {
        const std::int64_t place = query_place(head, first_token) + std::int64_t{query} * size;
        const DecoderScratch& s = *scratch_;
        const CodedTokens codes{s.query_codes.data() + place, s.query_scales.data() + place / block_columns,
                                s.query_sums.data() + place / block_columns};
        const Tokens queries{count, size, nullptr, codes};
        float* out = task.scores + std::int64_t{query} * attention_chunk + (begin - start) * tile_positions;
        kernel_.by_codes[static_cast<int>(WeightType::q8_0)](
            {keys + tile_bytes(cache_type_, size) * static_cast<std::size_t>(begin - origin), attention_chunk, queries, out,
             attention_chunk, 0, end - begin});
    };
    const int shared_end = std::min(end, task.shared_tiles), own_begin = std::max(begin, task.shared_tiles);
    if (begin < shared_end) multiply(task.shared.keys, 0, begin, shared_end, 0, task.count);
    for (int query = 0; own_begin < end && query < task.count; query += task.own_queries) {
        multiply(task.own[query / task.own_queries].keys, task.shared_tiles, own_begin, end, query, task.own_queries);
    }
}

void Decoder::attend_batch(const Pass& pass, int index, std::int64_t head, Range tokens) {
    AttentionScratch& scratch = scratch_->attention[pass.thread];
    AttentionTask task = attention_task(pass, index, head, tokens, scratch);
    const AttentionState merged = AttentionScratch::state(scratch.merged.data(), task.count);
    const AttentionState chunk = AttentionScratch::state(scratch.chunk.data(), task.count);
    std::fill(merged.largest, merged.largest + task.count, -std::numeric_limits<float>::infinity());
    const int first = *std::min_element(task.first, task.first + task.count) / attention_chunk;
    const int last = *std::max_element(task.last, task.last + task.count) / attention_chunk;
    for (int c = first; c <= last; ++c) {
        attend_chunk(head, tokens.first, task, c, chunk);
        ops_.merge(merged, chunk, task.count, task.head_size);
    }
    ops_.finish(merged, task.count, task.head_size, scratch.out.data());
}

// The chunks of positions that a pass's tokens see.
Decoder::Chunks Decoder::chunks_seen(const Pass& pass, int index) const {
    const int window = spec_.windows[index];
    int earliest = position_of(pass, 0), latest = position_of(pass, pass.count - 1);
    for (int t = 1; pass.branches != nullptr && t < pass.count; ++t) {
        earliest = std::min(earliest, position_of(pass, t)), latest = std::max(latest, position_of(pass, t - 1));
    }
    const int first = (window == 0 ? 0 : std::max(0, earliest - window + 1)) / attention_chunk;
    return {first, latest / attention_chunk - first + 1};
}

// Few tokens in a short context: each thread goes from its key heads' rows to their attention by itself.
void Decoder::attend_alone(const Pass& pass, int index, const Input& input) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const LayerAdapters& a = adapters_[index];
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads;
    const Range heads = share(spec_.kv_heads, pass.thread, pool_.size());
    const Range keys{heads.first * size, heads.last * size}, queries{keys.first * group, keys.last * group};
    multiply(w.query, a.query_rows, input, s.query.data(), queries);
    multiply(w.key, a.key_rows, input, s.key.data(), keys);
    multiply(w.value, a.value_rows, input, s.value.data(), keys);
    prepare(pass, index, heads, {0, pass.count});
    for (auto head = heads.first; head < heads.last; ++head) {
        for (int t = 0; t < pass.count; t += batch_tokens()) attend_batch(pass, index, head, batch_at(pass, t));
    }
    for (int t = 0; t < pass.count; ++t) quantize_part(s.attended, spec_.heads * size, t, queries, {&w.output});
}

void Decoder::attend_together(const Pass& pass, int index, const Input& input) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const LayerAdapters& a = adapters_[index];
    multiply_together(pass, w.query, a.query_rows, input, s.query.data());
    multiply_together(pass, w.key, a.key_rows, input, s.key.data());
    multiply_together(pass, w.value, a.value_rows, input, s.value.data());
    pool_.barrier();
    const Range units = share(static_cast<std::int64_t>(pass.count) * spec_.kv_heads, pass.thread, pool_.size());
    for (auto unit = units.first; unit < units.last; ++unit) {
        const std::int64_t t = unit / spec_.kv_heads, head = unit % spec_.kv_heads;
        prepare(pass, index, {head, head + 1}, {t, t + 1});
    }
    pool_.barrier();
    if (pass.few && chunks_seen(pass, index).count > 1 && pool_.size() > 1) {
        attend_chunks(pass, index);
    } else {
        const int batches = (pass.count + batch_tokens() - 1) / batch_tokens();
        pool_.divide(pass.thread, batches * spec_.kv_heads, [&](std::int64_t part) {
            attend_batch(pass, index, part / batches, batch_at(pass, static_cast<int>(part % batches) * batch_tokens()));
        });
    }
    pool_.barrier();
    const int columns = spec_.heads * spec_.head_size;
    const Range mine = share(columns, pass.thread, pool_.size(), block_columns);
    for (int t = 0; t < pass.count; ++t) quantize_part(s.attended, columns, t, mine, {&weights_.layers[index].output});
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
        AttentionTask task = attention_task(pass, index, head, {0, pass.count}, scratch);
        attend_chunk(head, 0, task, chunks.first + chunk, state(head, chunk));
    });
    pool_.barrier();
    for (int head = pass.thread; head < spec_.kv_heads; head += pool_.size()) {
        const AttentionState merged = AttentionScratch::state(scratch.merged.data(), count);
        std::fill(merged.largest, merged.largest + count, -std::numeric_limits<float>::infinity());
        for (int chunk = 0; chunk < chunks.count; ++chunk) ops_.merge(merged, state(head, chunk), count, size);
        attention_task(pass, index, head, {0, pass.count}, scratch);
        ops_.finish(merged, count, size, scratch.out.data());
    }
}

// In the order of caches.
std::size_t Decoder::cached_head(int layer, std::int64_t kv_head) const {
    return static_cast<std::size_t>(layer) * spec_.kv_heads + static_cast<std::size_t>(kv_head);
}

}  // namespace quantlab::engine
