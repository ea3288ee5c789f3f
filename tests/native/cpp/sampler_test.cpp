// The sampler: draws are those of a full sort in double precision, at every size, whatever was drawn before.
#include "check.h"

#include "../../../quantlab/native/src/engine/random_number.h"
#include "../../../quantlab/native/src/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

using quantlab::engine::random_word;
using quantlab::engine::Sampler;
using quantlab::engine::SamplerSettings;

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Without bias and penalties.
std::int32_t plain_draw(const std::vector<float>& logits, const SamplerSettings& settings, std::uint64_t position) {
    std::vector<std::size_t> ids(logits.size());
    std::iota(ids.begin(), ids.end(), std::size_t{0});
    std::stable_sort(ids.begin(), ids.end(), [&](std::size_t a, std::size_t b) { return logits[a] > logits[b]; });
    if (settings.temperature == 0) return static_cast<std::int32_t>(ids[0]);
    if (settings.top_k > 0) ids.resize(std::min(ids.size(), settings.top_k));
    std::vector<double> sums;
    double sum = 0;
    std::size_t above = 0;
    for (const std::size_t id : ids) {
        const double fall = static_cast<double>(logits[id]) - static_cast<double>(logits[ids[0]]);
        const double weight = std::exp(fall / settings.temperature);
        above += weight >= settings.min_p ? 1 : 0;
        sums.push_back(sum += weight);
    }
    const auto reached = std::lower_bound(sums.begin(), sums.end(), settings.top_p * sum) - sums.begin();
    const std::size_t nucleus = settings.top_p < 1 ? static_cast<std::size_t>(reached) + 1 : sums.size();
    sums.resize(std::min(nucleus, above));
    const double target = static_cast<double>(random_word(settings.seed, position) >> 11) * 0x1p-53 * sums.back();
    const auto place = std::upper_bound(sums.begin(), sums.end(), target) - sums.begin();
    return static_cast<std::int32_t>(ids[static_cast<std::size_t>(place)]);
}

std::vector<float> noise(std::size_t count, Random& random) {
    std::vector<float> logits(count);
    for (float& logit : logits) {
        logit = 8.0f * random.real();
    }
    return logits;
}

void test_draws_are_those_of_a_full_sort() {
    Random random(1);
    for (const std::size_t size : {1, 2, 63, 64, 65, 1000, 5003}) {
        for (int round = 0; round < 60; ++round) {
            SamplerSettings settings;
            settings.temperature = round % 10 == 0 ? 0 : 0.2 + 0.1 * random.below(20);
            const int some = random.below(static_cast<int>(size)) + 1;
            settings.top_k = random.below(2) == 0 ? 0 : static_cast<std::size_t>(some);
            settings.top_p = random.below(2) == 0 ? 1 : 0.01 * (random.below(99) + 1);
            settings.min_p = random.below(2) == 0 ? 0 : 0.01 * random.below(30);
            settings.seed = random.bits();
            Sampler sampler(size, settings);
            for (std::uint64_t position = 0; position < 5; ++position) {
                const std::vector<float> logits = noise(size, random);
                CHECK(sampler.draw(logits.data(), nullptr, 0, 0, position) == plain_draw(logits, settings, position));
            }
        }
    }
}

// Infinities, the largest numbers, subnormals and extreme settings: a token that can come, and no undefined arithmetic.
void test_extremes() {
    const float largest = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
    const std::vector<float> logits = {-infinity, largest, -largest, least, 0.0f, -0.0f, largest, -infinity};
    const std::vector<std::int32_t> history = {0, 1, 1, 2, 3, 4, 7, 7};
    for (const double temperature : {0.0, 5e-324, 1e-40, 1.0, 1e300}) {
        for (const double factor : {1.0, 1e-300, 1e300}) {
            for (const double penalty : {0.0, -1e308, 1e308}) {
                SamplerSettings settings;
                settings.logit_bias = {{3, 1e308}, {5, -1e308}, {6, -static_cast<double>(infinity)}};
                settings.repetition_penalty = factor;
                settings.presence_penalty = settings.frequency_penalty = penalty;
                settings.temperature = temperature;
                settings.top_p = 1e-300;
                settings.min_p = 1e-300;
                Sampler sampler(logits.size(), settings);
                for (std::uint64_t position = 0; position < 20; ++position) {
                    const std::int32_t token = sampler.draw(logits.data(), history.data(), history.size(), 1, position);
                    CHECK(token > 0 && token < 6);
                }
            }
        }
    }
}

template <typename Draw>
std::string fault_of(const Draw& draw) {
    try {
        draw();
    } catch (const std::domain_error& error) {
        return error.what();
    }
    return "";
}

void test_faults() {
    for (const std::size_t at : {0, 63, 64, 99}) {
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity}) {
            std::vector<float> logits(100, 1.0f);
            logits[at] = bad;
            Sampler sampler(100, {});
            const std::string fault = fault_of([&] { sampler.draw(logits.data(), nullptr, 0, 0, 0); });
            const std::string what = bad == infinity ? "infinite" : "NaN";
            CHECK(fault == "the logit of token " + std::to_string(at) + " is " + what);
        }
    }
    const std::vector<float> none(100, -infinity);
    Sampler sampler(100, {});
    CHECK(fault_of([&] { sampler.draw(none.data(), nullptr, 0, 0, 0); }) == "every token's logit is minus infinity");
}

// numpy.random.Philox(key=key, counter=counter).random_raw()
void test_random_words() {
    constexpr std::uint64_t last = ~std::uint64_t{0};
    CHECK(random_word(0, 0) == 0x02f4ba6408e4d89bu);
    CHECK(random_word(last, last) == 0xe23d141355b65d09u);
}

}  // namespace

void test_sampler() {
    test_draws_are_those_of_a_full_sort();
    test_extremes();
    test_faults();
    test_random_words();
}
