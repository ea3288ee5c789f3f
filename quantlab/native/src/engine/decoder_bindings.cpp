// The decoder's Python door: arrays in and out, errors as exceptions, the interpreter free while it works.
#include "decoder_bindings.h"

#include "bandwidth.h"
#include "decoder.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;

namespace quantlab::engine {

namespace {

using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

std::vector<float> copied(const Floats& values) { return {values.data(), values.data() + values.size()}; }

// Weights by the names that Python gives them: "query", "attention_norm" ...
Linear& linear_of(DecoderWeights& weights, int layer, const std::string& name) {
    if (name == "head") return weights.head;
    LayerWeights& w = weights.layers.at(static_cast<std::size_t>(layer));
    if (name == "query") return w.query;
    if (name == "key") return w.key;
    if (name == "value") return w.value;
    if (name == "output") return w.output;
    if (name == "gate") return w.gate;
    if (name == "up") return w.up;
    if (name == "down") return w.down;
    throw nb::key_error(name.c_str());
}

NormWeights& norm_of(DecoderWeights& weights, int layer, const std::string& name) {
    if (name == "final_norm") return weights.final_norm;
    LayerWeights& w = weights.layers.at(static_cast<std::size_t>(layer));
    if (name == "attention_norm") return w.attention_norm;
    if (name == "query_norm") return w.query_norm;
    if (name == "key_norm") return w.key_norm;
    if (name == "attention_post_norm") return w.attention_post_norm;
    if (name == "inner_norm") return w.inner_norm;
    if (name == "inner_post_norm") return w.inner_post_norm;
    throw nb::key_error(name.c_str());
}

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

    nb::class_<DecoderWeights>(module, "DecoderWeights")
        .def("__init__",
             [](DecoderWeights* self, int layers) {
                 new (self) DecoderWeights{};
                 self->layers.resize(static_cast<std::size_t>(layers));
             })
        .def("set_embedding", [](DecoderWeights& w, std::shared_ptr<PackedMatrix> m) { w.embedding = std::move(m); })
        .def("set_positions", [](DecoderWeights& w, std::shared_ptr<PackedMatrix> m) { w.positions = std::move(m); })
        .def("set_matrix", [](DecoderWeights& w, int layer, const std::string& name,
                              std::shared_ptr<PackedMatrix> m) { linear_of(w, layer, name).weight = std::move(m); })
        .def("set_bias", [](DecoderWeights& w, int layer, const std::string& name, const Floats& bias) {
            linear_of(w, layer, name).bias = copied(bias);
        })
        .def("set_norm", [](DecoderWeights& w, int layer, const std::string& name, const Floats& weight) {
            norm_of(w, layer, name).weight = copied(weight);
        })
        .def("set_norm_bias", [](DecoderWeights& w, int layer, const std::string& name, const Floats& bias) {
            norm_of(w, layer, name).bias = copied(bias);
        })
        .def("add_rotary_table", [](DecoderWeights& w, const Floats& cosines, const Floats& sines) {
            w.cosines.push_back(copied(cosines));
            w.sines.push_back(copied(sines));
        });

    module.def(
        "read_bandwidth",
        [](std::int64_t bytes, int threads, int passes) {
            if (bytes < 1 || threads < 1 || passes < 1) throw nb::value_error("bytes, threads and passes must be positive");
            const nb::gil_scoped_release free;
            return read_bandwidth(bytes, threads, passes);
        },
        nb::arg("bytes"), nb::arg("threads"), nb::arg("passes"));

    nb::class_<Decoder>(module, "Decoder")
        .def("__init__",
             [](Decoder* self, const DecoderSpec& spec, const DecoderWeights& weights, int context, int cache,
                bool int8_activations, int threads) {
                 new (self) Decoder(spec, weights, context, static_cast<CacheType>(cache), int8_activations, threads);
             })
        .def_prop_ro("position", &Decoder::position)
        .def_prop_ro("context", &Decoder::context)
        .def("append",
             [](Decoder& decoder, const Ids& tokens, const Logits& logits) {
                 if (logits.shape(0) > 0 && static_cast<int>(logits.shape(1)) != decoder.spec().vocabulary) {
                     throw nb::value_error("logits must have a column for each token of the vocabulary");
                 }
                 const nb::gil_scoped_release free;
                 decoder.append(tokens.data(), static_cast<int>(tokens.size()), logits.data(),
                                static_cast<int>(logits.shape(0)));
             })
        .def("rewind", &Decoder::rewind)
        .def("cache_bytes", &Decoder::cache_bytes)
        .def("export_cache", [](const Decoder& decoder, const Bytes& bytes) {
            if (bytes.size() != decoder.cache_bytes(decoder.position())) throw nb::value_error("not the cache's size");
            decoder.export_cache(bytes.data());
        })
        .def("import_cache", [](Decoder& decoder, const Bytes& bytes, int positions) {
            if (positions < 0 || bytes.size() != decoder.cache_bytes(positions)) {
                throw nb::value_error("not the cache's size");
            }
            decoder.import_cache(bytes.data(), positions);
        });
}

}  // namespace quantlab::engine
