// Tiny random decoders: one for what each family of models is made of, and random mixes of all parts.
#pragma once

#include "check.h"
#include "weight_rows.h"

#include "../../../quantlab/native/src/engine/decoder.h"

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace decoder_model {

using namespace quantlab::engine;

// What DecoderWeights has beyond the matrices.
struct Parts {
    bool learned_positions = false;
    bool attention_biases = false;
    bool all_biases = false;
    bool head_norms = false;
    bool post_norms = false;
    int tables = 1;
    bool ternary = false;  // most matrices, where their columns allow
};

struct Model {
    std::string name;
    DecoderSpec spec;
    Parts parts;
    std::uint64_t seed;
};

inline Model base(const char* name, int heads, int kv_heads, int head_size) {
    Model model{name, {}, {}, 17};
    DecoderSpec& d = model.spec;
    d.layers = 2, d.hidden = 32, d.inner = 64, d.vocabulary = 37;
    d.heads = heads, d.kv_heads = kv_heads, d.head_size = head_size;
    d.rotated = head_size;
    d.attention_scale = 1.0f / std::sqrt(static_cast<float>(head_size));
    d.windows = {0, 0}, d.rope_tables = {0, 0};
    return model;
}

inline std::vector<Model> families() {
    Model gpt2 = base("learned positions, layer norms, biases", 2, 2, 32);
    gpt2.spec.norm = Norm::layer, gpt2.spec.activation = Activation::gelu_tanh;
    gpt2.spec.gated = false, gpt2.spec.rotated = 0;
    gpt2.parts.learned_positions = gpt2.parts.all_biases = true;
    Model neox = base("parallel residual, part of a head rotated", 2, 2, 32);
    neox.spec.norm = Norm::layer, neox.spec.activation = Activation::gelu_erf;
    neox.spec.gated = false, neox.spec.parallel_residual = true, neox.spec.rotated = 8;
    neox.parts.all_biases = true;
    const Model llama = base("grouped queries", 8, 2, 32);
    Model mistral = base("sliding windows", 5, 1, 32);
    mistral.spec.windows = {5, 17};
    Model qwen = base("head norms, attention biases", 2, 1, 32);
    qwen.parts.head_norms = qwen.parts.attention_biases = true;
    Model gemma2 = base("soft caps, norms after, alternating windows", 4, 2, 32);
    gemma2.spec.activation = Activation::gelu_tanh, gemma2.spec.embedding_scale = 5.65f;
    gemma2.spec.attention_cap = 0.5f, gemma2.spec.logit_cap = 3.0f, gemma2.spec.windows = {8, 0};
    gemma2.parts.post_norms = true;
    Model gemma3 = base("two rotary tables", 1, 1, 64);
    gemma3.spec.windows = {1, 0}, gemma3.spec.rope_tables = {1, 0};
    gemma3.parts.tables = 2, gemma3.parts.head_norms = gemma3.parts.post_norms = true;
    return {gpt2, neox, llama, mistral, qwen, gemma2, gemma3};
}

// Sizes that ternary weights want; matrices that share an input differ in how they want it rounded.
inline Model ternary() {
    Model model = base("ternary weights among others", 8, 2, 32);
    model.spec.layers = 1, model.spec.hidden = 256, model.spec.inner = 256;
    model.spec.windows = {0}, model.spec.rope_tables = {0};
    model.parts.ternary = true;
    return model;
}

inline Model mixed(std::uint64_t seed) {
    Random random(seed);
    const int kv_heads = 1 + random.below(3);
    const auto coin = [&] { return random.below(2) == 1; };
    Model model = base("a mix", kv_heads * (1 + random.below(6)), kv_heads, 32 * (1 + random.below(3)));
    DecoderSpec& d = model.spec;
    d.layers = 1 + random.below(3);
    d.hidden = 16 * (1 + random.below(5)), d.inner = 16 * (1 + random.below(6)), d.vocabulary = 1 + random.below(50);
    d.norm = coin() ? Norm::rms : Norm::layer;
    d.activation = static_cast<Activation>(random.below(3));
    d.gated = coin(), d.parallel_residual = coin();
    d.rotated = 2 * random.below(d.head_size / 2 + 1);
    d.embedding_scale = coin() ? 1.0f : 2.5f;
    d.attention_cap = coin() ? 0.0f : 1.0f, d.logit_cap = coin() ? 0.0f : 2.0f;
    Parts& p = model.parts;
    p = {coin(), coin(), coin(), coin(), coin(), 1 + random.below(2)};
    d.windows.clear(), d.rope_tables.clear();
    for (int layer = 0; layer < d.layers; ++layer) {
        d.windows.push_back(coin() ? 0 : 1 + random.below(40));
        d.rope_tables.push_back(random.below(p.tables));
    }
    model.seed = seed;
    return model;
}

class WeightMaker {
public:
    WeightMaker(const Model& model, int context) : model_(model), context_(context), random_(model.seed) {}

    DecoderWeights made() {
        const DecoderSpec& d = model_.spec;
        const Parts& p = model_.parts;
        DecoderWeights w;
        w.embedding = matrix(d.vocabulary, d.hidden);
        if (p.learned_positions) w.positions = matrix(context_, d.hidden);
        for (int layer = 0; layer < d.layers; ++layer) w.layers.push_back(layer_weights());
        w.final_norm = norm(d.hidden);
        w.head = linear(d.vocabulary, d.hidden, p.all_biases);
        for (int table = 0; table < p.tables; ++table) {
            w.cosines.emplace_back(), w.sines.emplace_back();
            for (int position = 0; position < context_; ++position) {
                for (int pair = 0; pair < d.rotated / 2; ++pair) {
                    const float angle = static_cast<float>(position) / static_cast<float>(1 + pair * (table + 1));
                    w.cosines.back().push_back(std::cos(angle)), w.sines.back().push_back(std::sin(angle));
                }
            }
        }
        return w;
    }

private:
    std::shared_ptr<const PackedMatrix> matrix(int rows, int columns) {
        WeightType type = weight_types[random_.below(columns % 32 == 0 ? 8 : 3)];
        if (model_.parts.ternary && columns % ternary_columns == 0 && random_.below(3) > 0) type = WeightType::tq2_0;
        auto made = std::make_shared<PackedMatrix>(type, rows, columns);
        made->fill(0, rows, random_rows(type, rows, columns, random_).data());
        return made;
    }

    std::vector<float> vector(int size, float middle) {
        std::vector<float> values(static_cast<std::size_t>(size));
        for (float& value : values) value = middle + 0.3f * random_.real();
        return values;
    }

    Linear linear(int rows, int columns, bool biased) {
        Linear made{matrix(rows, columns), {}};
        if (biased) made.bias = vector(rows, 0);
        return made;
    }

    NormWeights norm(int size) {
        NormWeights made{vector(size, 1), {}};
        if (model_.spec.norm == Norm::layer) made.bias = vector(size, 0);
        return made;
    }

    LayerWeights layer_weights() {
        const DecoderSpec& d = model_.spec;
        const Parts& p = model_.parts;
        const int query = d.heads * d.head_size, key = d.kv_heads * d.head_size;
        const bool attention = p.attention_biases || p.all_biases;
        LayerWeights w;
        w.attention_norm = norm(d.hidden), w.inner_norm = norm(d.hidden);
        if (p.head_norms) w.query_norm = norm(d.head_size), w.key_norm = norm(d.head_size);
        if (p.post_norms) w.attention_post_norm = norm(d.hidden), w.inner_post_norm = norm(d.hidden);
        w.query = linear(query, d.hidden, attention), w.key = linear(key, d.hidden, attention);
        w.value = linear(key, d.hidden, attention), w.output = linear(d.hidden, query, p.all_biases);
        if (d.gated) w.gate = linear(d.inner, d.hidden, p.all_biases);
        w.up = linear(d.inner, d.hidden, p.all_biases), w.down = linear(d.hidden, d.inner, p.all_biases);
        return w;
    }

    const Model& model_;
    int context_;
    Random random_;
};

// Adapters whose matrices share products, have some of their own, or none.
class AdapterMaker {
public:
    AdapterMaker(const DecoderSpec& spec, int rank, Random& random) : d_(spec), rank_(rank), random_(random) {}

    std::vector<LayerAdapters> made() {
        std::vector<LayerAdapters> all(static_cast<std::size_t>(d_.layers));
        const int query = d_.heads * d_.head_size, key = d_.kv_heads * d_.head_size;
        for (LayerAdapters& a : all) {
            a.attention = input(d_.hidden), a.output = input(query), a.inner = input(d_.hidden), a.down = input(d_.inner);
            a.query_rows = rows(a.attention, query), a.key_rows = rows(a.attention, key);
            a.value_rows = rows(a.attention, key), a.output_rows = rows(a.output, d_.hidden);
            if (d_.gated) a.gate_rows = rows(a.inner, d_.inner);
            a.up_rows = rows(a.inner, d_.inner), a.down_rows = rows(a.down, d_.hidden);
        }
        return all;
    }

private:
    LowRankInput input(int columns) { return {rank_, numbers(std::int64_t{rank_} * columns)}; }

    LowRankRows rows(const LowRankInput& from, int count) {
        const int first = random_.below(from.rank + 1), rank = random_.below(from.rank - first + 1);
        return {first, rank, numbers(std::int64_t{rank} * count)};
    }

    std::vector<float> numbers(std::int64_t count) {
        std::vector<float> values(static_cast<std::size_t>(count));
        for (float& value : values) value = 0.1f * random_.real();
        return values;
    }

    const DecoderSpec& d_;
    int rank_;
    Random& random_;
};

}  // namespace decoder_model
