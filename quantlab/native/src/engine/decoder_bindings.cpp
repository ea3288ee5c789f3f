// The decoder's Python door: arrays in and out, errors as exceptions, the interpreter free while it works.
#include "decoder_bindings.h"

#include "../array_argument.h"
#include "bandwidth.h"
#include "decoder.h"
#include "decoder_checks.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace quantlab::engine {

namespace {

std::vector<float> floats_of(const char* name, nb::handle given) {
    const auto values = array_of<const float, 1>(name, given, "[elements]");
    return {values.data(), values.data() + values.size()};
}

int count_of(const char* name, std::size_t count) {
    if (count > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
        throw nb::value_error((std::string(name) + " has " + std::to_string(count) + " entries: too many").c_str());
    }
    return static_cast<int>(count);
}

[[noreturn]] void no_layer(int layer, std::size_t layers) {
    throw nb::index_error(("layer " + std::to_string(layer) + ": there are " + std::to_string(layers)).c_str());
}

void check_layers(int layers) {
    if (layers >= 1 && layers <= most_decoder_layers) return;
    const std::string expected = "; expected 1 to " + std::to_string(most_decoder_layers);
    throw nb::value_error(("layers is " + std::to_string(layers) + expected).c_str());
}

LayerWeights& layer_of(DecoderWeights& weights, int layer) {
    if (layer < 0 || static_cast<std::size_t>(layer) >= weights.layers.size()) no_layer(layer, weights.layers.size());
    return weights.layers[static_cast<std::size_t>(layer)];
}

[[noreturn]] void no_such(const char* kind, const std::string& name) {
    throw nb::key_error(("there is no " + std::string(kind) + " '" + name + "'").c_str());
}

// Weights by the names that Python gives them: "query", "attention_norm" ...
Linear& linear_of(DecoderWeights& weights, int layer, const std::string& name) {
    if (name == "head") return weights.head;
    LayerWeights& w = layer_of(weights, layer);
    if (name == "query") return w.query;
    if (name == "key") return w.key;
    if (name == "value") return w.value;
    if (name == "output") return w.output;
    if (name == "gate") return w.gate;
    if (name == "up") return w.up;
    if (name == "down") return w.down;
    no_such("matrix", name);
}

NormWeights& norm_of(DecoderWeights& weights, int layer, const std::string& name) {
    if (name == "final_norm") return weights.final_norm;
    LayerWeights& w = layer_of(weights, layer);
    if (name == "attention_norm") return w.attention_norm;
    if (name == "query_norm") return w.query_norm;
    if (name == "key_norm") return w.key_norm;
    if (name == "attention_post_norm") return w.attention_post_norm;
    if (name == "inner_norm") return w.inner_norm;
    if (name == "inner_post_norm") return w.inner_post_norm;
    no_such("norm", name);
}

// Inputs and rows by the names of decoder_adapters.h.
LowRankInput& input_of(LayerAdapters& adapters, const std::string& name) {
    if (name == "attention") return adapters.attention;
    if (name == "output") return adapters.output;
    if (name == "inner") return adapters.inner;
    if (name == "down") return adapters.down;
    no_such("input", name);
}

LowRankRows& update_of(LayerAdapters& adapters, const std::string& name) {
    if (name == "query") return adapters.query_rows;
    if (name == "key") return adapters.key_rows;
    if (name == "value") return adapters.value_rows;
    if (name == "output") return adapters.output_rows;
    if (name == "gate") return adapters.gate_rows;
    if (name == "up") return adapters.up_rows;
    if (name == "down") return adapters.down_rows;
    no_such("matrix", name);
}

struct DecoderAdapters {
    std::vector<LayerAdapters> layers;

    LayerAdapters& at(int layer) {
        if (layer < 0 || static_cast<std::size_t>(layer) >= layers.size()) no_layer(layer, layers.size());
        return layers[static_cast<std::size_t>(layer)];
    }

    void set_input(int layer, const std::string& name, nb::handle factor) {
        LowRankInput& input = input_of(at(layer), name);
        const auto a = array_of<const float, 2>("a", factor, "[rank, columns]");
        input = {count_of("a", a.shape(0)), {a.data(), a.data() + a.size()}};
    }

    void set_rows(int layer, const std::string& name, int first, nb::handle factor) {
        LowRankRows& update = update_of(at(layer), name);
        const auto b = array_of<const float, 2>("b", factor, "[rows, rank]");
        const std::size_t rows = b.shape(0), rank = b.shape(1);
        if (rows % group_rows != 0) {
            throw nb::value_error(("b has " + std::to_string(rows) + " rows; expected a multiple of 16").c_str());
        }
        std::vector<float> interleaved(b.size());
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t r = 0; r < rank; ++r) {
                interleaved[(row / group_rows * rank + r) * group_rows + row % group_rows] = b.data()[row * rank + r];
            }
        }
        update = {first, count_of("b", rank), std::move(interleaved)};
    }
};

}  // namespace

void bind_decoder(nb::module_& module) {
    nb::class_<DecoderSpec>(module, "DecoderSpec")
        .def(nb::init<>())
        .def_rw("layers", &DecoderSpec::layers)
        .def_rw("hidden", &DecoderSpec::hidden)
        .def_rw("heads", &DecoderSpec::heads)
        .def_rw("kv_heads", &DecoderSpec::kv_heads)
        .def_rw("head_size", &DecoderSpec::head_size)
        .def_rw("inner", &DecoderSpec::inner)
        .def_rw("vocabulary", &DecoderSpec::vocabulary)
        .def_prop_rw(
            "norm", [](const DecoderSpec& s) { return static_cast<int>(s.norm); },
            [](DecoderSpec& s, int norm) { s.norm = static_cast<Norm>(norm); })
        .def_rw("epsilon", &DecoderSpec::epsilon)
        .def_prop_rw(
            "activation", [](const DecoderSpec& s) { return static_cast<int>(s.activation); },
            [](DecoderSpec& s, int activation) { s.activation = static_cast<Activation>(activation); })
        .def_rw("gated", &DecoderSpec::gated)
        .def_rw("parallel_residual", &DecoderSpec::parallel_residual)
        .def_rw("rotated", &DecoderSpec::rotated)
        .def_rw("embedding_scale", &DecoderSpec::embedding_scale)
        .def_rw("attention_scale", &DecoderSpec::attention_scale)
        .def_rw("attention_cap", &DecoderSpec::attention_cap)
        .def_rw("logit_cap", &DecoderSpec::logit_cap)
        .def_rw("windows", &DecoderSpec::windows)
        .def_rw("rope_tables", &DecoderSpec::rope_tables);

    using Matrix = std::shared_ptr<PackedMatrix>;
    nb::class_<DecoderWeights>(module, "DecoderWeights")
        .def("__init__",
             [](DecoderWeights* self, int layers) {
                 check_layers(layers);
                 new (self) DecoderWeights{};
                 self->layers.resize(static_cast<std::size_t>(layers));
             }, nb::arg("layers"))
        .def("set_embedding", [](DecoderWeights& w, Matrix matrix) { w.embedding = std::move(matrix); }, nb::arg("matrix"))
        .def("set_positions", [](DecoderWeights& w, Matrix matrix) { w.positions = std::move(matrix); }, nb::arg("matrix"))
        .def("set_matrix",
             [](DecoderWeights& w, int layer, const std::string& name, Matrix matrix) {
                 linear_of(w, layer, name).weight = std::move(matrix);
             }, nb::arg("layer"), nb::arg("name"), nb::arg("matrix"))
        .def("set_bias",
             [](DecoderWeights& w, int layer, const std::string& name, nb::handle bias) {
                 linear_of(w, layer, name).bias = floats_of(name.c_str(), bias);
             }, nb::arg("layer"), nb::arg("name"), nb::arg("bias"))
        .def("set_norm",
             [](DecoderWeights& w, int layer, const std::string& name, nb::handle weight) {
                 norm_of(w, layer, name).weight = floats_of(name.c_str(), weight);
             }, nb::arg("layer"), nb::arg("name"), nb::arg("weight"))
        .def("set_norm_bias",
             [](DecoderWeights& w, int layer, const std::string& name, nb::handle bias) {
                 norm_of(w, layer, name).bias = floats_of(name.c_str(), bias);
             }, nb::arg("layer"), nb::arg("name"), nb::arg("bias"))
        .def("add_rotary_table",
             [](DecoderWeights& w, nb::handle cosines, nb::handle sines) {
                 std::vector<float> c = floats_of("cosines", cosines), s = floats_of("sines", sines);
                 if (c.size() != s.size()) {
                     throw nb::value_error(("sines has " + std::to_string(s.size()) + " elements; expected " +
                                            std::to_string(c.size()) + ", those of cosines").c_str());
                 }
                 w.cosines.push_back(std::move(c));
                 w.sines.push_back(std::move(s));
             }, nb::arg("cosines"), nb::arg("sines"));

    nb::class_<DecoderAdapters>(module, "DecoderAdapters")
        .def("__init__",
             [](DecoderAdapters* self, int layers) {
                 check_layers(layers);
                 new (self) DecoderAdapters{std::vector<LayerAdapters>(static_cast<std::size_t>(layers))};
             }, nb::arg("layers"))
        .def("set_input", &DecoderAdapters::set_input, nb::arg("layer"), nb::arg("name"), nb::arg("a"))
        .def("set_rows", &DecoderAdapters::set_rows, nb::arg("layer"), nb::arg("name"), nb::arg("first"), nb::arg("b"));

    module.def(
        "read_bandwidth",
        [](std::int64_t bytes, int threads, int passes) {
            constexpr std::int64_t most_bytes = std::int64_t{1} << 40;
            if (bytes < 1 || bytes > most_bytes || threads < 1 || threads > most_decoder_threads || passes < 1) {
                throw nb::value_error("bytes, threads and passes must be positive, bytes at most 2^40, threads 1024");
            }
            const nb::gil_scoped_release free;
            return read_bandwidth(bytes, threads, passes);
        },
        nb::arg("bytes"), nb::arg("threads"), nb::arg("passes"));

    nb::class_<Decoder>(module, "Decoder")
        .def("__init__",
             [](Decoder* self, const DecoderSpec& spec, const DecoderWeights& weights, int context, int cache,
                bool int8_activations, int threads) {
                 new (self) Decoder(spec, weights, context, static_cast<CacheType>(cache), int8_activations, threads);
             }, nb::arg("spec"), nb::arg("weights"), nb::arg("context"), nb::arg("cache"), nb::arg("int8_activations"),
             nb::arg("threads"))
        .def_prop_ro("position", &Decoder::position)
        .def_prop_ro("context", &Decoder::context)
        .def("append",
             [](Decoder& decoder, nb::handle token_ids, nb::handle logits_out) {
                 const auto tokens = array_of<const std::int32_t, 1>("tokens", token_ids, "[tokens]");
                 const auto logits = array_of<float, 2>("logits", logits_out, "[tokens, vocabulary]");
                 const int count = count_of("tokens", tokens.size()), wanted = count_of("logits", logits.shape(0));
                 const auto vocabulary = static_cast<std::size_t>(decoder.spec().vocabulary);
                 if (wanted > 0 && logits.shape(1) != vocabulary) {
                     throw nb::value_error(("logits has " + std::to_string(logits.shape(1)) + " columns; expected " +
                                            std::to_string(vocabulary) + ", one for each token id").c_str());
                 }
                 const nb::gil_scoped_release free;
                 decoder.append(tokens.data(), count, logits.data(), wanted);
             }, nb::arg("tokens"), nb::arg("logits"))
        .def("begin_branches", &Decoder::begin_branches, nb::arg("count"), nb::arg("room"))
        .def("end_branches", &Decoder::end_branches)
        .def("branch_bytes", &Decoder::branch_bytes, nb::arg("count"), nb::arg("room"))
        .def("append_to_branches",
             [](Decoder& decoder, nb::handle token_ids, nb::handle branch_ids, nb::handle logits_out) {
                 const auto tokens = array_of<const std::int32_t, 1>("tokens", token_ids, "[tokens]");
                 const auto branches = array_of<const std::int32_t, 1>("branches", branch_ids, "[tokens]");
                 const auto logits = array_of<float, 2>("logits", logits_out, "[tokens, vocabulary]");
                 const int count = count_of("tokens", tokens.size());
                 if (branches.size() != tokens.size()) {
                     throw nb::value_error(("branches has " + std::to_string(branches.size()) + " entries; expected " +
                                            std::to_string(count) + ", one for each token").c_str());
                 }
                 const auto vocabulary = static_cast<std::size_t>(decoder.spec().vocabulary);
                 if (logits.shape(0) != tokens.size() || logits.shape(1) != vocabulary) {
                     throw nb::value_error(("logits has shape [" + std::to_string(logits.shape(0)) + ", " +
                                            std::to_string(logits.shape(1)) + "]; expected [" + std::to_string(count) + ", " +
                                            std::to_string(vocabulary) + "]").c_str());
                 }
                 const nb::gil_scoped_release free;
                 decoder.append_to_branches(tokens.data(), branches.data(), count, logits.data());
             }, nb::arg("tokens"), nb::arg("branches"), nb::arg("logits"))
        .def("set_adapters", [](Decoder& decoder, const DecoderAdapters& adapters) { decoder.set_adapters(adapters.layers); },
             nb::arg("adapters"))
        .def("rewind", &Decoder::rewind, nb::arg("position"))
        .def("cache_bytes", &Decoder::cache_bytes, nb::arg("positions"))
        .def("export_cache",
             [](const Decoder& decoder, nb::handle given, int first, int last) {
                 const auto bytes = array_of<std::uint8_t, 1>("bytes", given, "[cache bytes]");
                 decoder.export_cache(bytes.data(), bytes.size(), first, last);
             }, nb::arg("bytes"), nb::arg("first"), nb::arg("last"))
        .def("import_cache",
             [](Decoder& decoder, nb::handle given, int first, int last) {
                 const auto bytes = array_of<const std::uint8_t, 1>("bytes", given, "[cache bytes]");
                 decoder.import_cache(bytes.data(), bytes.size(), first, last);
             }, nb::arg("bytes"), nb::arg("first"), nb::arg("last"));
}

}  // namespace quantlab::engine
