// The sampler for Python. It keeps the interpreter's lock: a draw takes microseconds, and its memory is for one thread.
#include "sampler_bindings.h"

#include "../argument_checks.h"
#include "../array_argument.h"
#include "random_number.h"
#include "sampler.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace quantlab::engine {

namespace {

constexpr std::int64_t most_tokens = 1 << 22;  // of a vocabulary, as sampler.h asks
constexpr double infinity = std::numeric_limits<double>::infinity();

std::string printed(double number) { return nb::repr(nb::float_(number)).c_str(); }

// Is false for NaN.
void check_within(const char* name, double number, bool holds, const char* expected) {
    require(holds, std::string(name) + " is " + printed(number) + "; expected " + expected);
}

void check_count(const char* name, std::int64_t count) {
    require(count >= 0, std::string(name) + " is " + std::to_string(count) + "; expected 0 or more");
}

void check_bias(const std::vector<std::pair<std::int64_t, double>>& bias, std::int64_t vocabulary) {
    for (const auto& [id, value] : bias) {
        require(id >= 0 && id < vocabulary, "logit_bias: token id " + std::to_string(id) +
                                                " is outside the vocabulary of " + std::to_string(vocabulary));
        require(value < infinity, "logit_bias of token id " + std::to_string(id) + " is " + printed(value) +
                                      "; expected a number below infinity");
    }
}

// A factor that leaves zeros and signs alone, and numbers that add up to numbers.
void check_penalties(double repetition, double presence, double frequency) {
    check_within("repetition_penalty", repetition, repetition > 0 && repetition < infinity, "above 0 and finite");
    check_within("presence_penalty", presence, std::isfinite(presence), "a finite number");
    check_within("frequency_penalty", frequency, std::isfinite(frequency), "a finite number");
}

// A sampler and the room for the history that it is given as a list.
class ListSampler {
public:
    ListSampler(std::size_t vocabulary, SamplerSettings settings) : sampler_(vocabulary, std::move(settings)) {}

    // Only the tokens that a penalty looks at are read.
    std::int32_t draw(nb::handle given, const nb::list& tokens, std::int64_t prompt_tokens,
                      std::uint64_t position) {
        const auto logits = array_of<const float, 1>("logits", given, "[vocabulary]");
        if (logits.size() != sampler_.vocabulary()) {
            fail("there are " + std::to_string(logits.size()) + " logits; expected " +
                 std::to_string(sampler_.vocabulary()));
        }
        check_count("prompt", prompt_tokens);
        const auto prompt = static_cast<std::size_t>(prompt_tokens);
        history_.clear();
        std::size_t skipped = 0;
        if (sampler_.reads_history()) {
            const std::size_t window = sampler_.penalty_window();
            skipped = window > 0 && window < tokens.size() ? tokens.size() - window : 0;
            for (std::size_t i = skipped; i < tokens.size(); ++i) {
                history_.push_back(checked(tokens[i]));
            }
        }
        return sampler_.draw(logits.data(), history_.data(), history_.size(), prompt > skipped ? prompt - skipped : 0,
                             position);
    }

private:
    std::int32_t checked(const nb::object& token) const {
        std::int64_t id = 0;
        if (!nb::try_cast(token, id)) {
            throw nb::type_error(("history: expected token ids, got " + std::string(nb::repr(token).c_str())).c_str());
        }
        require(id >= 0 && static_cast<std::size_t>(id) < sampler_.vocabulary(),
                "token id " + std::to_string(id) + " is outside the vocabulary of " +
                    std::to_string(sampler_.vocabulary()));
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
            [](ListSampler* place, std::int64_t vocabulary,
               const std::vector<std::pair<std::int64_t, double>>& logit_bias, double repetition_penalty,
               double presence_penalty, double frequency_penalty, std::int64_t penalty_window, double temperature,
               std::int64_t top_k, double top_p, double min_p, std::uint64_t seed) {
                checked_number("vocabulary", vocabulary, 1, most_tokens);
                check_bias(logit_bias, vocabulary);
                check_penalties(repetition_penalty, presence_penalty, frequency_penalty);
                check_count("penalty_window", penalty_window);
                check_within("temperature", temperature, temperature >= 0 && temperature < infinity,
                             "0 or more, and finite");
                check_count("top_k", top_k);
                check_within("top_p", top_p, top_p > 0 && top_p <= 1, "above 0 and at most 1");
                check_within("min_p", min_p, min_p >= 0 && min_p <= 1, "0 to 1");
                new (place) ListSampler(static_cast<std::size_t>(vocabulary),
                                        {{logit_bias.begin(), logit_bias.end()},
                                         repetition_penalty,
                                         presence_penalty,
                                         frequency_penalty,
                                         static_cast<std::size_t>(penalty_window),
                                         temperature,
                                         static_cast<std::size_t>(top_k),
                                         top_p,
                                         min_p,
                                         seed});
            },
            nb::arg("vocabulary"), nb::kw_only(), nb::arg("logit_bias"), nb::arg("repetition_penalty"),
            nb::arg("presence_penalty"), nb::arg("frequency_penalty"), nb::arg("penalty_window"),
            nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"), nb::arg("seed"))
        .def("draw", &ListSampler::draw, nb::arg("logits").none(), nb::arg("history"), nb::arg("prompt"),
             nb::arg("position"));
    module.def("random_word", &random_word, nb::arg("key"), nb::arg("counter"));
}

}  // namespace quantlab::engine
