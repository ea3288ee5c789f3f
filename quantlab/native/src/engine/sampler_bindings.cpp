// The sampler for Python. It keeps the interpreter's lock: a draw takes microseconds, and its memory is for one thread.
#include "sampler_bindings.h"

#include "../array_argument.h"
#include "random_number.h"
#include "sampler.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace quantlab::engine {

namespace {

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

// A sampler and the room for the history that it is given as a list.
class ListSampler {
public:
    ListSampler(std::size_t vocabulary, SamplerSettings settings) : sampler_(vocabulary, std::move(settings)) {}

    // Only the tokens that a penalty looks at are read.
    std::int32_t draw(nb::handle given, const nb::list& tokens, std::size_t prompt, std::uint64_t position) {
        const auto logits = array_of<const float, 1>("logits", given, "[vocabulary]");
        if (logits.size() != sampler_.vocabulary()) {
            fail("there are " + std::to_string(logits.size()) + " logits; expected " +
                 std::to_string(sampler_.vocabulary()));
        }
        history_.clear();
        std::size_t skipped = 0;
        if (sampler_.reads_history()) {
            const std::size_t window = sampler_.penalty_window();
            skipped = window > 0 && window < tokens.size() ? tokens.size() - window : 0;
            for (std::size_t i = skipped; i < tokens.size(); ++i) {
                const nb::handle token = PyList_GET_ITEM(tokens.ptr(), static_cast<Py_ssize_t>(i));
                history_.push_back(checked(nb::cast<std::int64_t>(token)));
            }
        }
        return sampler_.draw(logits.data(), history_.data(), history_.size(), prompt > skipped ? prompt - skipped : 0,
                             position);
    }

private:
    std::int32_t checked(std::int64_t id) const {
        if (id < 0 || static_cast<std::size_t>(id) >= sampler_.vocabulary()) {
            fail("token id " + std::to_string(id) + " is outside the vocabulary of " +
                 std::to_string(sampler_.vocabulary()));
        }
        return static_cast<std::int32_t>(id);
    }

    Sampler sampler_;
    std::vector<std::int32_t> history_;
};

}  // namespace

void bind_sampler(nb::module_& module) {
    nb::class_<ListSampler>(module, "Sampler")
        .def(
            "__init__",
            [](ListSampler* place, std::size_t vocabulary, const std::vector<std::pair<std::int32_t, double>>& bias,
               double repetition_penalty, double presence_penalty, double frequency_penalty,
               std::size_t penalty_window, double temperature, std::size_t top_k, double top_p, double min_p,
               std::uint64_t seed) {
                if (vocabulary < 1 || vocabulary > (1u << 22)) fail("a vocabulary has from 1 to 2^22 tokens");
                for (const auto& [id, value] : bias) {
                    if (id < 0 || static_cast<std::size_t>(id) >= vocabulary) fail("logit bias: no such token id");
                }
                new (place) ListSampler(vocabulary, {bias, repetition_penalty, presence_penalty, frequency_penalty,
                                                     penalty_window, temperature, top_k, top_p, min_p, seed});
            },
            nb::arg("vocabulary"), nb::kw_only(), nb::arg("logit_bias"), nb::arg("repetition_penalty"),
            nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("penalty_window"),
            nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"))
        .def("draw", &ListSampler::draw, nb::arg("logits"), nb::arg("history"), nb::arg("prompt"),
             nb::arg("position"));
    module.def("random_word", &random_word, nb::arg("key"), nb::arg("counter"));
}

}  // namespace quantlab::engine
