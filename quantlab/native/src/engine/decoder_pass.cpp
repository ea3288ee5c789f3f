// One pass of the decoder: up to pass_tokens tokens through all layers, by all threads.
//
// Threads divide rows of matrices, so that every output has one author, and meet where one needs what others wrote. A
// thread whose query rows, key heads and attention outputs belong together goes through attention alone; whoever computes
// rows of gate and up activates them. With few tokens each thread also computes the residual stream for itself. So a
// token costs four meetings a layer.
//
// Adapters' products are taken by the thread that has the token; of few tokens by each thread for itself, in place of a
// meeting, unless there are many. So are int8 codes with one scale a token.
#include "decoder.h"

#include "decoder_parts.h"

#include <algorithm>

namespace quantlab::engine {

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
            weights_.positions->read_row(position_of(pass, t), place);
            ops_.add(row, place, hidden);
        }
    }
    for (int index = 0; index < spec_.layers; ++index) {
        attend(pass, index);
        feed_forward(pass, index);
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
        quantize(pass, stream.attention_input, spec_.hidden, t, {&weights_.head});
    }
    meet_unless_few(pass);
    const Tokens input = tokens_of(pass, stream.attention_input, wanted, spec_.hidden);
    multiply_together(pass, weights_.head, {}, {input, nullptr, 0}, logits);
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

void Decoder::feed_forward(const Pass& pass, int index) {
    DecoderScratch& s = *scratch_;
    const LayerWeights& w = weights_.layers[index];
    const LayerAdapters& a = adapters_[index];
    ResidualStream& stream = stream_of(pass);
    const int hidden = spec_.hidden, inner = spec_.inner;
    const Input input = input_of(pass, a.inner, stream.inner_input, hidden);
    divide(pass, inner, [&](Range part) {
        if (spec_.gated) multiply(w.gate, a.gate_rows, input, s.gate.data(), part);
        multiply(w.up, a.up_rows, input, s.inner.values.data(), part);
        for (std::int64_t t = 0; t < pass.count; ++t) {
            float* up = s.inner.values.data() + t * inner;
            float* gate = spec_.gated ? s.gate.data() + t * inner : nullptr;
            add_bias(w.up, up, part);
            if (gate != nullptr) add_bias(w.gate, gate, part);
            up += part.first;
            ops_.activate(spec_.activation, gate != nullptr ? gate + part.first : up, gate != nullptr ? up : nullptr,
                          static_cast<int>(part.last - part.first), up);
            quantize_part(s.inner, inner, t, part, {&w.down});
        }
    });
    pool_.barrier();
    take_input(pass, a.down, s.inner, inner, w.down);
    multiply_together(pass, w.down, a.down_rows, input_of(pass, a.down, s.inner, inner), s.sum.data());
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

// All rows of the matrix, by all threads.
void Decoder::multiply_together(const Pass& pass, const Linear& linear, const LowRankRows& update, const Input& x, float* out) {
    divide(pass, linear.weight->rows(), [&](Range rows) { multiply(linear, update, x, out, rows); });
}

// Rows first to last - 1 of the matrix, for all tokens; first is a multiple of group_rows.
void Decoder::multiply(const Linear& linear, const LowRankRows& update, const Input& x, float* out, Range rows) const {
    const auto groups = [](std::int64_t row) { return static_cast<int>((row + group_rows - 1) / group_rows); };
    const std::int64_t all = linear.weight->rows();
    linear.weight->multiply(x.tokens, out, all, groups(rows.first), groups(rows.last));
    if (update.rank == 0) return;
    for (std::int64_t t = 0; t < x.tokens.count; ++t) {
        ops_.add_low_rank(update.b.data() + rows.first * update.rank, update.rank, x.products + t * x.rank + update.first,
                          out + t * all + rows.first, static_cast<int>(rows.last - rows.first));
    }
}

// Whether threads share few tokens' products.
bool Decoder::divides_products(const Pass& pass, const LowRankInput& adapter, int columns) const {
    const std::int64_t work = std::int64_t{adapter.rank} * columns * pass.count;
    return pass.few && pool_.size() > 1 && work >= least_divided_products;
}

float* Decoder::products_of(const Pass& pass, const LowRankInput& adapter, int columns) const {
    const bool alone = pass.few && !divides_products(pass, adapter, columns);
    return (alone ? scratch_->threads[pass.thread] : scratch_->shared).products.data();
}

// This thread's part of the adapter's products with an input: of many tokens its own, of few all or its ranks.
void Decoder::take_products(const Pass& pass, const LowRankInput& adapter, const Activations& x, int columns) {
    if (adapter.rank == 0) return;
    Range ranks{0, adapter.rank};
    if (divides_products(pass, adapter, columns)) ranks = share(adapter.rank, pass.thread, pool_.size(), 4);
    const Range tokens = rows_of(pass, pass.count);
    float* products = products_of(pass, adapter, columns);
    for (auto t = tokens.first; t < tokens.last; ++t) {
        ops_.low_rank_products(adapter.a.data() + ranks.first * columns, static_cast<int>(ranks.last - ranks.first),
                               x.values.data() + t * columns, columns, products + t * adapter.rank + ranks.first);
    }
}

void Decoder::meet_if_divided(const Pass& pass, const LowRankInput& adapter, int columns) {
    if (divides_products(pass, adapter, columns)) pool_.barrier();
}

// Of an input that several threads wrote: its products with the adapter, and what needs whole tokens.
void Decoder::take_input(const Pass& pass, const LowRankInput& adapter, Activations& x, int columns, const Linear& reader) {
    take_products(pass, adapter, x, columns);
    const Range tokens = rows_of(pass, pass.count);
    for (auto t = tokens.first; t < tokens.last; ++t) quantize_row(pass, x, columns, t, {&reader});
    if (adapter.rank != 0 || wants_codes(ActivationScheme::token, {&reader})) meet_unless_few(pass);
    meet_if_divided(pass, adapter, columns);
}

// Whether one of the matrices multiplies int8 activations of that scheme.
bool Decoder::wants_codes(ActivationScheme scheme, Readers readers) const {
    return int8_ && std::any_of(readers.begin(), readers.end(), [&](const Linear* linear) {
        if (linear->weight == nullptr) return false;
        const WeightType type = linear->weight->type();
        return is_quantized(type) && activation_scheme(type) == scheme;
    });
}

// One token, whole.
void Decoder::quantize(const Pass& pass, Activations& x, int columns, std::int64_t token, Readers readers) {
    quantize_part(x, columns, token, {0, columns}, readers);
    quantize_row(pass, x, columns, token, readers);
}

// Columns of one token, in whole blocks.
void Decoder::quantize_part(Activations& x, int columns, std::int64_t token, Range part, Readers readers) const {
    if (part.first == part.last || !wants_codes(ActivationScheme::block, readers)) return;
    const std::int64_t at = token * columns + part.first;
    kernel_.quantize_token(x.values.data() + at, static_cast<int>(part.last - part.first), x.codes.data() + at,
                           x.scales.data() + at / block_columns, x.sums.data() + at / block_columns);
}

// One token with one scale: of few tokens by each thread for itself.
void Decoder::quantize_row(const Pass& pass, const Activations& x, int columns, std::int64_t token, Readers readers) {
    if (!wants_codes(ActivationScheme::token, readers)) return;
    RowCodes& to = stream_of(pass).row_codes;
    kernel_.quantize_row(x.values.data() + token * columns, columns, to.codes.data() + token * columns,
                         to.scales.data() + token, to.sums.data() + token * (columns / ternary_columns));
}

// Columns from a multiple of 16 on.
void Decoder::add_bias(const Linear& linear, float* row, Range part) const {
    if (linear.bias.empty()) return;
    const auto whole = static_cast<int>((part.last - part.first) / 16 * 16);
    ops_.add(row + part.first, linear.bias.data() + part.first, whole);
    for (auto i = part.first + whole; i < part.last; ++i) row[i] += linear.bias[i];
}

Tokens Decoder::tokens_of(const Pass& pass, const Activations& x, int count, int columns) {
    Tokens tokens{count, columns, x.values.data()};
    if (!int8_) return tokens;
    const RowCodes& rows = stream_of(pass).row_codes;
    tokens.by_block = {x.codes.data(), x.scales.data(), x.sums.data()};
    tokens.by_token = {rows.codes.data(), rows.scales.data(), rows.sums.data()};
    return tokens;
}

Decoder::Input Decoder::input_of(const Pass& pass, const LowRankInput& adapter, const Activations& x, int columns) {
    return {tokens_of(pass, x, pass.count, columns), products_of(pass, adapter, columns), adapter.rank};
}

}  // namespace quantlab::engine
