#include "decoder.h"

#include "../instruction_set.h"
#include "decoder_checks.h"
#include "decoder_parts.h"
#include "decoder_scratch.h"
#include "matmul_kernel.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace quantlab::engine {

namespace {

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

// Checks everything before a thread is started or memory taken.
int checked_threads(const DecoderSpec& spec, const DecoderWeights& weights, int context, CacheType cache, int threads) {
    check_decoder(spec, weights, context, cache, threads);
    return threads;
}

// The most columns of a matrix that reads codes with one scale a token; 0 if none does.
int widest_coded_rows(const DecoderWeights& weights) {
    std::int64_t widest = 0;
    const auto take = [&](const Linear& linear) {
        const PackedMatrix* matrix = linear.weight.get();
        if (matrix == nullptr || activation_scheme(matrix->type()) != ActivationScheme::token) return;
        widest = std::max(widest, matrix->columns());
    };
    for (const LayerWeights& w : weights.layers) {
        for (const Linear* linear : {&w.query, &w.key, &w.value, &w.output, &w.gate, &w.up, &w.down}) take(*linear);
    }
    take(weights.head);
    return static_cast<int>(widest);
}

DecoderScratch new_scratch(const DecoderSpec& spec, int threads, int coded_columns) {
    const int group = spec.heads / spec.kv_heads;
    const int query = spec.heads * spec.head_size, key = spec.kv_heads * spec.head_size;
    const auto floats = [](int columns) { return std::vector<float>(static_cast<std::size_t>(columns) * pass_tokens); };
    DecoderScratch s;
    s.shared = ResidualStream(pass_tokens, spec.hidden, coded_columns);
    s.threads.assign(threads, ResidualStream(few_tokens, spec.hidden, coded_columns));
    s.query = floats(query), s.key = floats(key), s.value = floats(key), s.sum = floats(spec.hidden);
    if (spec.gated) s.gate = floats(spec.inner);
    s.query_codes.resize(s.query.size());
    s.query_scales.resize(s.query.size() / block_columns + 1), s.query_sums.resize(s.query_scales.size());
    s.attended = Activations(pass_tokens, query), s.inner = Activations(pass_tokens, spec.inner);
    s.attention.assign(threads, AttentionScratch(std::max(attention_queries, few_tokens * group), spec.head_size));
    return s;
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

Decoder::Decoder(DecoderSpec spec, DecoderWeights weights, int context, CacheType cache, bool int8_activations,
                 int threads)
    : spec_(std::move(spec)), weights_(std::move(weights)), context_(context), cache_type_(cache),
      int8_(int8_activations), ops_(chosen_decoder_ops()), kernel_(matmul_kernel()),
      pool_(checked_threads(spec_, weights_, context, cache, threads)), scratch_(std::make_unique<DecoderScratch>()) {
    adapters_.resize(static_cast<std::size_t>(spec_.layers));
    head_bytes_ = head_cache_bytes(cache_type_, spec_.head_size, context_);
    const std::size_t all = head_bytes_ * static_cast<std::size_t>(spec_.layers) * spec_.kv_heads;
    key_cache_ = new_storage(all);
    value_cache_ = new_storage(all);
    *scratch_ = new_scratch(spec_, pool_.size(), int8_ ? widest_coded_rows(weights_) : 0);
    if (pool_.size() > 1 && context_ > attention_chunk) {
        const int chunks = context_ / attention_chunk + 2, queries = few_tokens * (spec_.heads / spec_.kv_heads);
        const std::size_t states = static_cast<std::size_t>(spec_.kv_heads) * chunks;
        scratch_->chunk_states.resize(states * AttentionScratch::state_floats(queries, spec_.head_size));
    }
}

Decoder::~Decoder() = default;

void Decoder::append(const std::int32_t* given, int count, float* logits, int wanted) {
    const OnlyUser user(used_);
    if (count < 1) refuse("no tokens to append");
    if (wanted < 0 || wanted > count) {
        refuse("logits has " + std::to_string(wanted) + " rows; expected at most one for each of " + std::to_string(count) + " tokens");
    }
    if (count > context_ - position_) {
        refuse(std::to_string(count) + " tokens do not fit: the context of " + std::to_string(context_) + " holds " +
               std::to_string(position_) + " already");
    }
    const std::vector<std::int32_t> tokens(given, given + count);  // the caller's may change after the check
    for (const std::int32_t token : tokens) check_token(token);
    branches_.clear();
    const int start = position_;
    try {
        for (int done = 0; done < count; done += pass_tokens) {
            const int size = std::min(pass_tokens, count - done);
            const int before = std::max(0, (count - wanted) - done);  // of this pass, without logits
            const int here = std::max(0, size - before);
            float* out = logits + static_cast<std::size_t>(std::max(0, done - (count - wanted))) * spec_.vocabulary;
            pool_.run_as_pays([&](int thread) { run({size, size <= few_tokens, thread, nullptr}, tokens.data() + done, out, here); });
            position_ += size;
        }
    } catch (...) {
        position_ = start;
        throw;
    }
}

void Decoder::check_token(std::int32_t token) const {
    if (token < 0 || token >= spec_.vocabulary) {
        refuse("token id " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(spec_.vocabulary));
    }
}

int Decoder::position() const {
    const OnlyUser user(used_);
    return position_;
}

void Decoder::rewind(int position) {
    const OnlyUser user(used_);
    if (position < 0 || position > position_) {
        refuse("position " + std::to_string(position) + ": the sequence has " + std::to_string(position_) + " tokens");
    }
    if (position < position_) branches_.clear();
    position_ = position;
}

void Decoder::set_adapters(std::vector<LayerAdapters> adapters) {
    const OnlyUser user(used_);
    if (adapters.empty()) adapters.resize(static_cast<std::size_t>(spec_.layers));
    check_adapters(spec_, adapters);
    int rank = 0;
    for (const LayerAdapters& a : adapters) {
        rank = std::max({rank, a.attention.rank, a.output.rank, a.inner.rank, a.down.rank});
    }
    const auto most = static_cast<std::size_t>(rank);
    for (ResidualStream& stream : scratch_->threads) stream.products.resize(most * few_tokens);
    scratch_->shared.products.resize(most * pass_tokens);
    adapters_ = std::move(adapters);
    branches_.clear();
    position_ = 0;
}

std::size_t Decoder::cache_bytes(int positions) const {
    if (positions < 0 || positions > context_) {
        refuse(std::to_string(positions) + " positions do not fit a context of " + std::to_string(context_));
    }
    const std::size_t heads = static_cast<std::size_t>(spec_.layers) * spec_.kv_heads;
    return 2 * heads * head_cache_bytes(cache_type_, spec_.head_size, positions);
}

// Of a cache in bytes: its first position may be `most_first`.
void Decoder::check_part(std::size_t size, int first, int last, int most_first) const {
    if (first < 0 || first > most_first || first % tile_positions != 0) {
        refuse("first is " + std::to_string(first) + "; expected a multiple of " + std::to_string(tile_positions) +
               " up to " + std::to_string(most_first));
    }
    if (last < first) refuse("last is " + std::to_string(last) + "; expected " + std::to_string(first) + " or more");
    if (last > context_) cache_bytes(last);  // refuses
    if (size != cache_bytes(last - first)) {
        refuse("bytes has " + std::to_string(size) + " bytes; expected " + std::to_string(cache_bytes(last - first)) +
               ", those of the cache of " + std::to_string(last - first) + " tokens");
    }
}

void Decoder::export_cache(std::uint8_t* bytes, std::size_t size_given, int first, int last) const {
    const OnlyUser user(used_);
    if (last > position_) refuse("last is " + std::to_string(last) + ": the sequence has " + std::to_string(position_) + " tokens");
    check_part(size_given, first, last, position_);
    const std::size_t size = head_cache_bytes(cache_type_, spec_.head_size, last - first);
    const std::size_t before = head_cache_bytes(cache_type_, spec_.head_size, first);
    for (const Storage* cache : {&key_cache_, &value_cache_}) {
        for (std::size_t begin = 0; size > 0 && begin < cache->get_deleter().bytes; begin += head_bytes_, bytes += size) {
            std::memcpy(bytes, cache->get() + begin + before, size);
        }
    }
}

void Decoder::import_cache(const std::uint8_t* bytes, std::size_t size_given, int first, int last) {
    const OnlyUser user(used_);
    check_part(size_given, first, last, position_);
    const std::size_t size = head_cache_bytes(cache_type_, spec_.head_size, last - first);
    const std::size_t before = head_cache_bytes(cache_type_, spec_.head_size, first);
    for (const Storage* cache : {&key_cache_, &value_cache_}) {
        for (std::size_t begin = 0; size > 0 && begin < cache->get_deleter().bytes; begin += head_bytes_, bytes += size) {
            std::memcpy(cache->get() + begin + before, bytes, size);
        }
    }
    branches_.clear();
    position_ = last;
}

}  // namespace quantlab::engine
