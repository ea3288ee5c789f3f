// One function for each kind of thing that can be wrong; every message names it.
#include "decoder_checks.h"

#include "kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quantlab::engine {

namespace {

constexpr std::int64_t most_columns = 1 << 24;  // of any activation: products of two sizes stay within int
constexpr int most_context = 1 << 28;

[[noreturn]] void refuse(const std::string& problem) { throw std::invalid_argument(problem); }

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
    if (value < least || value > most) {
        refuse(std::string(name) + " is " + std::to_string(value) + "; expected " + std::to_string(least) + " to " +
               std::to_string(most));
    }
}

void check_finite(const char* name, float value) {
    if (!std::isfinite(value)) refuse(std::string(name) + " is " + std::to_string(value) + "; expected a finite number");
}

void check_multiple(const char* name, int value, int unit, const char* why = "") {
    if (value % unit != 0) {
        refuse(std::string(name) + " is " + std::to_string(value) + "; expected a multiple of " + std::to_string(unit) + why);
    }
}

std::string shape(std::int64_t rows, std::int64_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

std::string shape_of(const PackedMatrix* matrix) {
    return matrix == nullptr ? "missing" : "has shape " + shape(matrix->rows(), matrix->columns());
}

void check_sizes(const DecoderSpec& d, int context, CacheType cache) {
    check_range("layers", d.layers, 1, most_decoder_layers);
    for (const auto& [name, value] : std::initializer_list<std::pair<const char*, int>>{
             {"hidden", d.hidden}, {"inner", d.inner}, {"heads", d.heads}, {"kv_heads", d.kv_heads}, {"head_size", d.head_size}}) {
        check_range(name, value, 1, most_columns);
    }
    check_range("heads * head_size", std::int64_t{d.heads} * d.head_size, 1, most_columns);
    check_range("vocabulary", d.vocabulary, 1, std::numeric_limits<int>::max() / 2);
    check_range("context", context, 1, most_context);
    check_multiple("heads", d.heads, d.kv_heads, ", the number of key heads");
    check_multiple("hidden", d.hidden, 16);
    check_multiple("inner", d.inner, 16);
    check_multiple("head_size", d.head_size, 16);
    check_range("cache type", static_cast<int>(cache), 0, static_cast<int>(CacheType::q8_0));
    if (cache == CacheType::q8_0) check_multiple("head_size", d.head_size, cache_block, " for a q8_0 cache");
    const double bytes = 2.0 * d.layers * d.kv_heads * static_cast<double>(head_cache_bytes(cache, d.head_size, context));
    if (bytes > most_cache_bytes) refuse("a cache of " + std::to_string(bytes) + " bytes is beyond all memory");
}

void check_kinds(const DecoderSpec& d) {
    check_range("norm", static_cast<int>(d.norm), 0, static_cast<int>(Norm::layer));
    check_range("activation", static_cast<int>(d.activation), 0, static_cast<int>(Activation::gelu_erf));
    check_finite("epsilon", d.epsilon);
    check_finite("embedding_scale", d.embedding_scale);
    check_finite("attention_scale", d.attention_scale);
    check_finite("attention_cap", d.attention_cap);
    check_finite("logit_cap", d.logit_cap);
    if (d.epsilon < 0) refuse("epsilon is negative");
    if (d.attention_cap < 0 || d.logit_cap < 0) refuse("attention_cap and logit_cap must not be negative");
}

void check_entries(const char* name, std::size_t found, int layers) {
    if (found != static_cast<std::size_t>(layers)) {
        refuse(std::string(name) + " has " + std::to_string(found) + " entries; expected one for each of " +
               std::to_string(layers) + " layers");
    }
}

void check_tables(const DecoderSpec& d, const DecoderWeights& w, int context) {
    check_entries("weights", w.layers.size(), d.layers);
    check_entries("windows", d.windows.size(), d.layers);
    check_entries("rope_tables", d.rope_tables.size(), d.layers);
    for (const int window : d.windows) check_range("a window", window, 0, std::numeric_limits<int>::max());
    check_range("rotated", d.rotated, 0, d.head_size);
    check_multiple("rotated", d.rotated, 2);
    if (d.rotated == 0) return;
    const std::size_t needed = static_cast<std::size_t>(context) * static_cast<std::size_t>(d.rotated / 2);
    for (const int table : d.rope_tables) {
        check_range("a layer's rotary table", table, 0, static_cast<std::int64_t>(w.cosines.size()) - 1);
        const auto at = static_cast<std::size_t>(table);
        const std::size_t found = std::min(w.cosines[at].size(), w.sines[at].size());
        if (found < needed) {
            refuse("rotary table " + std::to_string(table) + " has " + std::to_string(found) + " angles; expected " +
                   std::to_string(needed) + " for a context of " + std::to_string(context));
        }
    }
}

// Matrices and norms of one layer, or of none.
class Named {
public:
    Named(const DecoderSpec& spec, std::string prefix) : spec_(spec), prefix_(std::move(prefix)) {}

    void matrix(const char* name, const Linear& linear, std::int64_t rows, std::int64_t columns) const {
        if (linear.weight == nullptr || linear.weight->rows() != rows || linear.weight->columns() != columns) {
            refuse(prefix_ + name + " " + shape_of(linear.weight.get()) + "; expected " + shape(rows, columns));
        }
        if (!linear.bias.empty()) vector(name, "bias", linear.bias, rows);
    }

    void absent(const char* name, const Linear& linear, const char* reason) const {
        if (linear.weight != nullptr || !linear.bias.empty()) {
            refuse(prefix_ + name + " is given; expected none: " + reason);
        }
    }

    // A norm that is not there has neither weight nor bias.
    void norm(const char* name, const NormWeights& norm, int columns, bool optional) const {
        if (optional && norm.weight.empty() && norm.bias.empty()) return;
        vector(name, "weight", norm.weight, columns);
        if (spec_.norm == Norm::layer) {
            vector(name, "bias", norm.bias, columns);
        } else if (!norm.bias.empty()) {
            refuse(prefix_ + name + ".bias is given; expected none: rms norms have no bias");
        }
    }

private:
    void vector(const char* name, const char* part, const std::vector<float>& values, std::int64_t count) const {
        if (static_cast<std::int64_t>(values.size()) != count) {
            refuse(prefix_ + name + "." + part + " has " + std::to_string(values.size()) + " elements; expected " +
                   std::to_string(count));
        }
    }

    const DecoderSpec& spec_;
    std::string prefix_;
};

void check_layer(const DecoderSpec& d, const LayerWeights& w, const Named& named) {
    const int query = d.heads * d.head_size, key = d.kv_heads * d.head_size;
    named.matrix("query", w.query, query, d.hidden);
    named.matrix("key", w.key, key, d.hidden);
    named.matrix("value", w.value, key, d.hidden);
    named.matrix("output", w.output, d.hidden, query);
    if (d.gated) {
        named.matrix("gate", w.gate, d.inner, d.hidden);
    } else {
        named.absent("gate", w.gate, "the spec is not gated");
    }
    named.matrix("up", w.up, d.inner, d.hidden);
    named.matrix("down", w.down, d.hidden, d.inner);
    named.norm("attention_norm", w.attention_norm, d.hidden, false);
    named.norm("inner_norm", w.inner_norm, d.hidden, false);
    named.norm("query_norm", w.query_norm, d.head_size, true);
    named.norm("key_norm", w.key_norm, d.head_size, true);
    named.norm("attention_post_norm", w.attention_post_norm, d.hidden, true);
    named.norm("inner_post_norm", w.inner_post_norm, d.hidden, true);
}

void check_input(const std::string& name, const LowRankInput& input, std::int64_t columns) {
    check_range((name + ": rank").c_str(), input.rank, 0, most_adapter_rank);
    if (static_cast<std::int64_t>(input.a.size()) != input.rank * columns) {
        refuse(name + ": a has " + std::to_string(input.a.size()) + " elements; expected " + shape(input.rank, columns));
    }
}

void check_update(const std::string& name, const LowRankRows& update, const LowRankInput& input, std::int64_t rows) {
    check_range((name + ": rank").c_str(), update.rank, 0, input.rank);
    check_range((name + ": first").c_str(), update.first, 0, input.rank - update.rank);
    if (static_cast<std::int64_t>(update.b.size()) != update.rank * rows) {
        refuse(name + ": b has " + std::to_string(update.b.size()) + " elements; expected " + shape(rows, update.rank));
    }
}

// Tables of which rows are read: longer ones do.
void check_rows(const char* name, const PackedMatrix* table, std::int64_t rows, std::int64_t columns) {
    if (table == nullptr || table->rows() < rows || table->columns() != columns) {
        refuse(std::string(name) + " " + shape_of(table) + "; expected " + shape(rows, columns) + " or more rows");
    }
}

}  // namespace

void check_decoder(const DecoderSpec& d, const DecoderWeights& w, int context, CacheType cache, int threads) {
    check_range("threads", threads, 1, most_decoder_threads);
    check_sizes(d, context, cache);
    check_kinds(d);
    check_tables(d, w, context);
    check_rows("embedding", w.embedding.get(), d.vocabulary, d.hidden);
    if (w.positions != nullptr) check_rows("positions", w.positions.get(), context, d.hidden);
    for (std::size_t i = 0; i < w.layers.size(); ++i) {
        check_layer(d, w.layers[i], Named(d, "layer " + std::to_string(i) + ": "));
    }
    const Named whole(d, "");
    whole.norm("final_norm", w.final_norm, d.hidden, false);
    whole.matrix("head", w.head, d.vocabulary, d.hidden);
}

void check_adapters(const DecoderSpec& d, const std::vector<LayerAdapters>& adapters) {
    const std::int64_t query = std::int64_t{d.heads} * d.head_size, key = std::int64_t{d.kv_heads} * d.head_size;
    check_entries("adapters", adapters.size(), d.layers);
    for (std::size_t i = 0; i < adapters.size(); ++i) {
        const LayerAdapters& a = adapters[i];
        const std::string at = "adapter of layer " + std::to_string(i) + ": ";
        check_input(at + "attention", a.attention, d.hidden);
        check_input(at + "output", a.output, query);
        check_input(at + "inner", a.inner, d.hidden);
        check_input(at + "down", a.down, d.inner);
        check_update(at + "query", a.query_rows, a.attention, query);
        check_update(at + "key", a.key_rows, a.attention, key);
        check_update(at + "value", a.value_rows, a.attention, key);
        check_update(at + "output", a.output_rows, a.output, d.hidden);
        check_update(at + "gate", a.gate_rows, a.inner, d.gated ? d.inner : 0);
        check_update(at + "up", a.up_rows, a.inner, d.inner);
        check_update(at + "down", a.down_rows, a.down, d.hidden);
    }
}

}  // namespace quantlab::engine
