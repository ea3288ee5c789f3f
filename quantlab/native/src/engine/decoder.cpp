#include "decoder.h"

#include "../instruction_set.h"
#include "matmul_kernel.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quantlab::engine {

namespace {

constexpr int pass_tokens = 64;  // at a time: unpacked weights are used for all of them, and activations stay in cache

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

struct Range {
    std::int64_t first, last;
};

// The part of [0, count) that thread `thread` of `threads` works on.
Range share(std::int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace

const DecoderOps& chosen_decoder_ops() {
    switch (chosen_instruction_set().value_or(InstructionSet::scalar)) {
        case InstructionSet::avx512:
            if (avx512_decoder_ops() != nullptr) return *avx512_decoder_ops();
            [[fallthrough]];
        case InstructionSet::avx2:
            if (avx2_decoder_ops() != nullptr) return *avx2_decoder_ops();
            [[fallthrough]];
        case InstructionSet::scalar: break;
    }
    return scalar_decoder_ops();
}

// What one pass needs besides weights and cache. Rows are tokens.
struct Decoder::Scratch {
    std::vector<float> x, normed, inner_normed, query, key, value, attended, sum, gate, up;
    std::vector<std::int8_t> codes;
    std::vector<float> scales, sums;
    std::vector<std::vector<float>> scores;  // per thread
};

Decoder::Decoder(DecoderSpec spec, DecoderWeights weights, int context, CacheType cache, bool int8_activations,
                 int threads)
    : spec_(std::move(spec)), weights_(std::move(weights)), context_(context), cache_type_(cache),
      int8_(int8_activations), ops_(chosen_decoder_ops()), kernel_(matmul_kernel()), pool_(threads), scratch_(std::make_shared<Scratch>()) {
    check();
    head_bytes_ = head_cache_bytes(cache_type_, spec_.head_size, context_);
    const std::size_t all = head_bytes_ * static_cast<std::size_t>(spec_.layers) * spec_.kv_heads;
    key_cache_.resize(all);
    value_cache_.resize(all);
    const auto floats = [](int columns) { return std::vector<float>(static_cast<std::size_t>(columns) * pass_tokens); };
    const int query = spec_.heads * spec_.head_size, key = spec_.kv_heads * spec_.head_size;
    const int widest = std::max({spec_.hidden, query, spec_.inner});
    Scratch& s = *scratch_;
    s.x = floats(spec_.hidden), s.normed = floats(spec_.hidden), s.inner_normed = floats(spec_.hidden);
    s.sum = floats(spec_.hidden), s.query = floats(query), s.attended = floats(query);
    s.key = floats(key), s.value = floats(key), s.gate = floats(spec_.inner), s.up = floats(spec_.inner);
    s.codes.resize(static_cast<std::size_t>(widest) * pass_tokens);
    s.scales = floats(widest / cache_block + 1), s.sums = floats(widest / cache_block + 1);
    const std::size_t positions = (static_cast<std::size_t>(context_) + tile_positions) / tile_positions * tile_positions;
    s.scores.assign(pool_.size(), std::vector<float>(positions * (spec_.heads / spec_.kv_heads)));
}

void Decoder::append(const std::int32_t* tokens, int count, float* logits, int wanted) {
    if (count < 1) refuse("no tokens to append");
    if (wanted < 0 || wanted > count) refuse("logits of " + std::to_string(wanted) + " of " + std::to_string(count) + " tokens");
    if (count > context_ - position_) {
        refuse(std::to_string(count) + " tokens do not fit: the context of " + std::to_string(context_) + " holds " +
               std::to_string(position_) + " already");
    }
    for (int i = 0; i < count; ++i) {
        if (tokens[i] < 0 || tokens[i] >= spec_.vocabulary) {
            refuse("token id " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                   std::to_string(spec_.vocabulary));
        }
    }
    const int start = position_;
    try {
        for (int done = 0; done < count; done += pass_tokens) {
            const int size = std::min(pass_tokens, count - done);
            const int before = std::max(0, (count - wanted) - done);  // of this pass, without logits
            const int here = std::max(0, size - before);
            float* out = logits + static_cast<std::size_t>(std::max(0, done - (count - wanted))) * spec_.vocabulary;
            pool_.run([&](int thread) { run(tokens + done, size, out, here, thread); });
            position_ += size;
        }
    } catch (...) {
        position_ = start;
        throw;
    }
}

void Decoder::rewind(int position) {
    if (position < 0 || position > position_) {
        refuse("position " + std::to_string(position) + ": the sequence has " + std::to_string(position_) + " tokens");
    }
    position_ = position;
}

void Decoder::run(const std::int32_t* tokens, int count, float* logits, int wanted, int thread) {
    Scratch& s = *scratch_;
    const int hidden = spec_.hidden, threads = pool_.size();
    const Range mine = share(count, thread, threads);
    for (auto t = mine.first; t < mine.last; ++t) {
        float* row = s.x.data() + t * hidden;
        weights_.embedding->read_row(tokens[t], row);
        if (spec_.embedding_scale != 1.0f) ops_.scale(row, spec_.embedding_scale, hidden);
        if (weights_.positions != nullptr) {
            float* place = s.sum.data() + t * hidden;
            weights_.positions->read_row(position_ + t, place);
            ops_.add(row, place, hidden);
        }
    }
    for (int index = 0; index < spec_.layers; ++index) layer(index, count, thread);
    if (wanted == 0) return;
    pool_.barrier();
    const Range last = share(wanted, thread, threads);
    for (auto t = last.first; t < last.last; ++t) {
        const float* row = s.x.data() + (count - wanted + t) * hidden;
        float* out = s.normed.data() + t * hidden;
        norm(weights_.final_norm, row, hidden, out);
        if (int8_ && hidden % cache_block == 0) {
            const std::int64_t block = t * (hidden / cache_block);
            kernel_.quantize_token(out, hidden, s.codes.data() + t * hidden, s.scales.data() + block, s.sums.data() + block);
        }
    }
    pool_.barrier();
    multiply(weights_.head, tokens_of(s.normed, wanted, hidden), logits, thread);
    if (spec_.logit_cap == 0.0f && weights_.head.bias.empty()) return;
    pool_.barrier();
    for (auto t = last.first; t < last.last; ++t) {
        float* row = logits + t * spec_.vocabulary;
        add_bias(weights_.head, row);
        if (spec_.logit_cap != 0.0f) {
            alignas(64) float tail[16];
            const int whole = spec_.vocabulary / 16 * 16, rest = spec_.vocabulary - whole;
            ops_.cap(row, spec_.logit_cap, whole);
            if (rest > 0) {
                std::fill(tail, tail + 16, 0.0f);
                std::copy(row + whole, row + spec_.vocabulary, tail);
                ops_.cap(tail, spec_.logit_cap, 16);
                std::copy(tail, tail + rest, row + whole);
            }
        }
    }
}

void Decoder::layer(int index, int count, int thread) {
    Scratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const int hidden = spec_.hidden, inner = spec_.inner, threads = pool_.size();
    const Range mine = share(count, thread, threads);
    const auto quantize_row = [&](float* row, std::int64_t t, int columns) {
        if (!int8_ || columns % cache_block != 0) return;
        const std::int64_t block = t * (columns / cache_block);
        kernel_.quantize_token(row, columns, s.codes.data() + t * columns, s.scales.data() + block, s.sums.data() + block);
    };
    const auto quantize_all = [&](const std::vector<float>& values, int columns) {
        if (!int8_ || columns % cache_block != 0) return;
        const Range blocks = share(static_cast<std::int64_t>(count) * columns / cache_block, thread, threads);
        if (blocks.first == blocks.last) return;
        const std::int64_t at = blocks.first * cache_block;
        kernel_.quantize_token(values.data() + at, static_cast<int>((blocks.last - blocks.first) * cache_block),
                       s.codes.data() + at, s.scales.data() + blocks.first, s.sums.data() + blocks.first);
    };

    for (auto t = mine.first; t < mine.last; ++t) {
        const float* row = s.x.data() + t * hidden;
        norm(w.attention_norm, row, hidden, s.normed.data() + t * hidden);
        if (spec_.parallel_residual) norm(w.inner_norm, row, hidden, s.inner_normed.data() + t * hidden);
        quantize_row(s.normed.data() + t * hidden, t, hidden);
    }
    pool_.barrier();
    const Tokens normed = tokens_of(s.normed, count, hidden);
    multiply(w.query, normed, s.query.data(), thread);
    multiply(w.key, normed, s.key.data(), thread);
    multiply(w.value, normed, s.value.data(), thread);
    pool_.barrier();
    attention(index, count, thread);
    pool_.barrier();
    const int attended = spec_.heads * spec_.head_size;
    quantize_all(s.attended, attended);
    pool_.barrier();
    multiply(w.output, tokens_of(s.attended, count, attended), s.sum.data(), thread);
    pool_.barrier();
    for (auto t = mine.first; t < mine.last; ++t) {
        float *row = s.x.data() + t * hidden, *sum = s.sum.data() + t * hidden;
        float* ready = s.inner_normed.data() + t * hidden;
        add_bias(w.output, sum);
        if (!w.attention_post_norm.weight.empty()) norm(w.attention_post_norm, sum, hidden, sum);
        ops_.add(row, sum, hidden);
        if (!spec_.parallel_residual) norm(w.inner_norm, row, hidden, ready);
        quantize_row(ready, t, hidden);
    }
    pool_.barrier();
    const Tokens ready = tokens_of(s.inner_normed, count, hidden);
    if (spec_.gated) multiply(w.gate, ready, s.gate.data(), thread);
    multiply(w.up, ready, s.up.data(), thread);
    pool_.barrier();
    if (!w.up.bias.empty() || !w.gate.bias.empty()) {
        for (auto t = mine.first; t < mine.last; ++t) {
            add_bias(w.up, s.up.data() + t * inner);
            add_bias(w.gate, s.gate.data() + t * inner);
        }
        pool_.barrier();
    }
    const Range lanes = share(static_cast<std::int64_t>(count) * inner / 16, thread, threads);
    const std::int64_t at = lanes.first * 16;
    const int columns = static_cast<int>((lanes.last - lanes.first) * 16);
    float* up = s.up.data() + at;
    ops_.activate(spec_.activation, spec_.gated ? s.gate.data() + at : up, spec_.gated ? up : nullptr, columns, up);
    pool_.barrier();
    quantize_all(s.up, inner);
    pool_.barrier();
    multiply(w.down, tokens_of(s.up, count, inner), s.sum.data(), thread);
    pool_.barrier();
    for (auto t = mine.first; t < mine.last; ++t) {
        float* sum = s.sum.data() + t * hidden;
        add_bias(w.down, sum);
        if (!w.inner_post_norm.weight.empty()) norm(w.inner_post_norm, sum, hidden, sum);
        ops_.add(s.x.data() + t * hidden, sum, hidden);
    }
}

void Decoder::attention(int index, int count, int thread) {
    Scratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const int size = spec_.head_size, group = spec_.heads / spec_.kv_heads, half = spec_.rotated / 2;
    const int query_columns = spec_.heads * size, key_columns = spec_.kv_heads * size;
    const Range units = share(static_cast<std::int64_t>(count) * spec_.kv_heads, thread, pool_.size());
    const auto prepare = [&](float* head, const std::vector<float>& bias, int column, const NormWeights& head_norm, int at) {
        if (!bias.empty()) ops_.add(head, bias.data() + column, size);
        if (!head_norm.weight.empty()) norm(head_norm, head, size, head);
        if (half == 0) return;
        const std::size_t place = static_cast<std::size_t>(at) * half;
        const int table = spec_.rope_tables[index];
        ops_.rotate(head, weights_.cosines[table].data() + place, weights_.sines[table].data() + place, half);
    };
    for (auto unit = units.first; unit < units.last; ++unit) {
        const int t = static_cast<int>(unit / spec_.kv_heads), kv = static_cast<int>(unit % spec_.kv_heads);
        const int at = position_ + t;
        for (int g = 0; g < group; ++g) {
            const int column = (kv * group + g) * size;
            prepare(s.query.data() + static_cast<std::size_t>(t) * query_columns + column, w.query.bias, column, w.query_norm, at);
        }
        float* key = s.key.data() + static_cast<std::size_t>(t) * key_columns + kv * size;
        float* value = s.value.data() + static_cast<std::size_t>(t) * key_columns + kv * size;
        prepare(key, w.key.bias, kv * size, w.key_norm, at);
        if (!w.value.bias.empty()) ops_.add(value, w.value.bias.data() + kv * size, size);
        ops_.store_key(cache_type_, keys(index, kv), at, key, size);
        ops_.store_value(cache_type_, values(index, kv), at, value, size);
    }
    pool_.barrier();
    const int window = spec_.windows[index];
    for (auto unit = units.first; unit < units.last; ++unit) {
        const int t = static_cast<int>(unit / spec_.kv_heads), kv = static_cast<int>(unit % spec_.kv_heads);
        const int at = position_ + t;
        const std::size_t column = static_cast<std::size_t>(t) * query_columns + static_cast<std::size_t>(kv) * group * size;
        AttentionTask task{};
        task.queries = s.query.data() + column;
        task.out = s.attended.data() + column;
        task.keys = keys(index, kv);
        task.values = values(index, kv);
        task.first = window == 0 ? 0 : std::max(0, at - window + 1);
        task.last = at;
        task.head_size = size;
        task.group = group;
        task.scale = spec_.attention_scale;
        task.cap = spec_.attention_cap;
        task.scores = s.scores[thread].data();
        task.score_stride = static_cast<int>(s.scores[thread].size() / group);
        ops_.attend(cache_type_, task);
    }
}

void Decoder::norm(const NormWeights& weights, const float* x, int n, float* out) const {
    if (spec_.norm == Norm::layer) {
        ops_.layer_norm(x, weights.weight.data(), weights.bias.data(), n, spec_.epsilon, out);
    } else {
        ops_.rms_norm(x, weights.weight.data(), n, spec_.epsilon, out);
    }
}

void Decoder::multiply(const Linear& linear, const Tokens& x, float* out, int thread) const {
    const Range groups = share(linear.weight->groups(), thread, pool_.size());
    linear.weight->multiply(x, out, linear.weight->rows(), static_cast<int>(groups.first), static_cast<int>(groups.last));
}

void Decoder::add_bias(const Linear& linear, float* row) const {
    if (linear.bias.empty()) return;
    const int n = static_cast<int>(linear.bias.size()), whole = n / 16 * 16;
    ops_.add(row, linear.bias.data(), whole);
    for (int i = whole; i < n; ++i) row[i] += linear.bias[i];
}

Tokens Decoder::tokens_of(const std::vector<float>& values, int count, int columns) const {
    const Scratch& s = *scratch_;
    const bool coded = int8_ && columns % cache_block == 0;
    return {count, columns, values.data(), coded ? s.codes.data() : nullptr, s.scales.data(), s.sums.data()};
}

std::uint8_t* Decoder::keys(int layer, int kv_head) {
    return key_cache_.data() + (static_cast<std::size_t>(layer) * spec_.kv_heads + kv_head) * head_bytes_;
}

std::uint8_t* Decoder::values(int layer, int kv_head) {
    return value_cache_.data() + (static_cast<std::size_t>(layer) * spec_.kv_heads + kv_head) * head_bytes_;
}

std::size_t Decoder::cache_bytes(int positions) const {
    const std::size_t heads = static_cast<std::size_t>(spec_.layers) * spec_.kv_heads;
    return 2 * heads * head_cache_bytes(cache_type_, spec_.head_size, positions);
}

void Decoder::export_cache(std::uint8_t* bytes) const {
    const std::size_t size = head_cache_bytes(cache_type_, spec_.head_size, position_);
    for (const std::vector<std::uint8_t>* cache : {&key_cache_, &value_cache_}) {
        for (std::size_t begin = 0; begin < cache->size(); begin += head_bytes_, bytes += size) {
            std::memcpy(bytes, cache->data() + begin, size);
        }
    }
}

void Decoder::import_cache(const std::uint8_t* bytes, int positions) {
    if (positions < 0 || positions > context_) {
        refuse(std::to_string(positions) + " positions do not fit a context of " + std::to_string(context_));
    }
    const std::size_t size = head_cache_bytes(cache_type_, spec_.head_size, positions);
    for (std::vector<std::uint8_t>* cache : {&key_cache_, &value_cache_}) {
        for (std::size_t begin = 0; begin < cache->size(); begin += head_bytes_, bytes += size) {
            std::memcpy(cache->data() + begin, bytes, size);
        }
    }
    position_ = positions;
}

void Decoder::check() const {
    const DecoderSpec& d = spec_;
    if (d.layers < 1 || d.hidden < 1 || d.heads < 1 || d.kv_heads < 1 || d.head_size < 1 || d.inner < 1) {
        refuse("the spec has a size below 1");
    }
    if (d.heads % d.kv_heads != 0) refuse("query heads are no multiple of key heads");
    if (d.hidden % 16 != 0 || d.head_size % 16 != 0 || d.inner % 16 != 0) {
        refuse("hidden, head and inner sizes must be multiples of 16");
    }
    if (cache_type_ == CacheType::q8_0 && d.head_size % cache_block != 0) refuse("a q8_0 cache needs heads of a multiple of 32");
    if (context_ < 1) refuse("a context of less than one token");
    if (static_cast<int>(d.windows.size()) != d.layers || static_cast<int>(d.rope_tables.size()) != d.layers ||
        static_cast<int>(weights_.layers.size()) != d.layers) {
        refuse("windows, rotary tables and weights must be there for every layer");
    }
    if (d.rotated % 2 != 0 || d.rotated < 0 || d.rotated > d.head_size) refuse("rotated columns must be an even part of a head");
    for (int table : d.rope_tables) {
        const std::size_t needed = static_cast<std::size_t>(context_) * d.rotated / 2;
        if (d.rotated == 0) break;
        if (table < 0 || table >= static_cast<int>(weights_.cosines.size()) ||
            weights_.cosines[table].size() < needed || weights_.sines[table].size() < needed) {
            refuse("a rotary table is missing or shorter than the context");
        }
    }
    const auto matrix = [](const char* name, const Linear& linear, std::int64_t rows, std::int64_t columns) {
        if (linear.weight == nullptr || linear.weight->rows() != rows || linear.weight->columns() != columns) {
            refuse(std::string(name) + " must be a matrix of " + std::to_string(rows) + " x " + std::to_string(columns));
        }
        if (!linear.bias.empty() && static_cast<std::int64_t>(linear.bias.size()) != rows) {
            refuse(std::string(name) + ": its bias must have " + std::to_string(rows) + " elements");
        }
    };
    const auto normed = [&d](const char* name, const NormWeights& w, int n, bool optional) {
        if (optional && w.weight.empty()) return;
        if (static_cast<int>(w.weight.size()) != n || (d.norm == Norm::layer && static_cast<int>(w.bias.size()) != n)) {
            refuse(std::string(name) + " must have " + std::to_string(n) + " weights" +
                   (d.norm == Norm::layer ? " and biases" : ""));
        }
    };
    if (weights_.embedding == nullptr || weights_.embedding->rows() < d.vocabulary || weights_.embedding->columns() != d.hidden) {
        refuse("the embedding must be a matrix of " + std::to_string(d.vocabulary) + " x " + std::to_string(d.hidden));
    }
    if (weights_.positions != nullptr && (weights_.positions->rows() < context_ || weights_.positions->columns() != d.hidden)) {
        refuse("the table of positions is shorter than the context");
    }
    const int query = d.heads * d.head_size, key = d.kv_heads * d.head_size;
    for (const LayerWeights& w : weights_.layers) {
        matrix("query", w.query, query, d.hidden);
        matrix("key", w.key, key, d.hidden);
        matrix("value", w.value, key, d.hidden);
        matrix("output", w.output, d.hidden, query);
        if (d.gated) matrix("gate", w.gate, d.inner, d.hidden);
        matrix("up", w.up, d.inner, d.hidden);
        matrix("down", w.down, d.hidden, d.inner);
        normed("attention_norm", w.attention_norm, d.hidden, false);
        normed("inner_norm", w.inner_norm, d.hidden, false);
        normed("query_norm", w.query_norm, d.head_size, true);
        normed("key_norm", w.key_norm, d.head_size, true);
        normed("attention_post_norm", w.attention_post_norm, d.hidden, true);
        normed("inner_post_norm", w.inner_post_norm, d.hidden, true);
    }
    normed("final_norm", weights_.final_norm, d.hidden, false);
    matrix("head", weights_.head, d.vocabulary, d.hidden);
}

}  // namespace quantlab::engine
