// Branches of a sequence: the bits that the sequence gives when it is continued alone, whoever else is computed with them.
#include "check.h"
#include "decoder_cases.h"

#include "../../../quantlab/native/src/engine/decoder_checks.h"
#include "../../../quantlab/native/src/engine/decoder_ops.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

using namespace decoder_model;

namespace {

// A continuation and the logits behind each of its tokens.
struct Continuation {
    std::vector<std::int32_t> tokens;
    Logits expected;
};

// Computed alone, token by token; the decoder is as before.
std::vector<Continuation> continued_alone(Decoder& decoder, int count, int longest, Random& random) {
    const int start = decoder.position();
    std::vector<Continuation> all;
    for (int i = 0; i < count; ++i) {
        Continuation made{random_tokens(1 + random.below(longest), decoder.spec().vocabulary, random), {}};
        for (const std::int32_t& token : made.tokens) {
            const Logits logits = appended(decoder, &token, 1, 1);
            made.expected.insert(made.expected.end(), logits.begin(), logits.end());
        }
        decoder.rewind(start);
        all.push_back(std::move(made));
    }
    return all;
}

// Appends the next token of some of the branches in any order, until all are done.
void check_branches(Decoder& decoder, const std::vector<Continuation>& all, bool all_at_once, Random& random) {
    const auto vocabulary = static_cast<std::size_t>(decoder.spec().vocabulary);
    std::vector<std::size_t> done(all.size());
    for (;;) {
        std::vector<std::int32_t> tokens, branches;
        bool more = false;
        for (std::size_t i = 0; i < all.size(); ++i) {
            if (done[i] == all[i].tokens.size()) continue;
            more = true;
            if (!all_at_once && random.below(2) == 0) continue;
            const auto place = static_cast<std::ptrdiff_t>(all_at_once ? tokens.size() : random.below(static_cast<int>(tokens.size()) + 1));
            tokens.insert(tokens.begin() + place, all[i].tokens[done[i]]);
            branches.insert(branches.begin() + place, static_cast<std::int32_t>(i));
        }
        if (!more) return;
        if (tokens.empty()) continue;
        Logits found(tokens.size() * vocabulary, -1.0f);
        decoder.append_to_branches(tokens.data(), branches.data(), static_cast<int>(tokens.size()), found.data());
        for (std::size_t i = 0; i < tokens.size(); ++i) {
            const auto branch = static_cast<std::size_t>(branches[i]);
            const float* expected = all[branch].expected.data() + done[branch]++ * vocabulary;
            for (std::size_t v = 0; v < vocabulary; ++v) CHECK(same_bits(found[i * vocabulary + v], expected[v]));
        }
    }
}

void test_model(const Model& model, const std::vector<std::string>& sets, Random& random) {
    std::printf("branches: %s\n", model.name.c_str());
    constexpr int context = 100, longest = 20;
    for (const CacheType cache : cache_types) {
        const bool int8 = random.below(2) == 1;
        const int prompt = random.below(context - longest);
        const std::vector<std::int32_t> tokens = random_tokens(prompt, model.spec.vocabulary, random);
        force("scalar");
        Decoder alone(model.spec, WeightMaker(model, context).made(), context, cache, int8, 1);
        const std::vector<LayerAdapters> adapters = AdapterMaker(model.spec, random.below(10), random).made();
        alone.set_adapters(adapters);
        if (prompt > 0) appended(alone, tokens.data(), prompt, 0);
        const std::vector<Continuation> all = continued_alone(alone, 1 + random.below(9), longest, random);
        for (const std::string& set : sets) {
            force(set.c_str());
            Decoder decoder(model.spec, WeightMaker(model, context).made(), context, cache, int8, 1 + random.below(3));
            decoder.set_adapters(adapters);
            if (prompt > 0) appended(decoder, tokens.data(), prompt, 0);
            for (const bool all_at_once : {true, false}) {
                decoder.begin_branches(static_cast<int>(all.size()), longest);
                check_branches(decoder, all, all_at_once, random);
                CHECK(decoder.position() == prompt);
            }
        }
    }
}

// Shared tiles that end inside a chunk of positions, at its border, and branches that cross one.
void test_long_context(const Model& model, Random& random) {
    std::printf("branches: long context, %s\n", model.name.c_str());
    constexpr int longest = 25;
    for (const int prompt : {attention_chunk - 10, attention_chunk, attention_chunk + 37}) {
        const int context = prompt + longest;
        const std::vector<std::int32_t> tokens = random_tokens(prompt, model.spec.vocabulary, random);
        const DecoderWeights weights = WeightMaker(model, context).made();
        for (const CacheType cache : cache_types) {
            Decoder alone(model.spec, weights, context, cache, true, 1);
            appended(alone, tokens.data(), prompt, 0);
            std::vector<std::uint8_t> bytes(alone.cache_bytes(prompt));
            alone.export_cache(bytes.data(), bytes.size(), 0, prompt);
            const std::vector<Continuation> all = continued_alone(alone, 6, longest, random);
            for (const int threads : {1, 2, 3}) {
                Decoder decoder(model.spec, weights, context, cache, true, threads);
                decoder.import_cache(bytes.data(), bytes.size(), 0, prompt);
                decoder.begin_branches(6, longest);
                check_branches(decoder, all, threads == 1, random);
            }
        }
    }
}

// More branches than a pass takes.
void test_many(Random& random) {
    std::printf("branches: many\n");
    const Model model = families()[2];
    Decoder decoder(model.spec, WeightMaker(model, 30).made(), 30, CacheType::f16, true, 2);
    const std::vector<std::int32_t> tokens = random_tokens(18, model.spec.vocabulary, random);
    appended(decoder, tokens.data(), 18, 0);
    const std::vector<Continuation> all = continued_alone(decoder, 70, 4, random);
    decoder.begin_branches(70, 4);
    check_branches(decoder, all, true, random);
}

void test_refusals() {
    const Model model = families()[2];
    Decoder decoder(model.spec, WeightMaker(model, 8).made(), 8, CacheType::f16, true, 2);
    const std::int32_t prompt[] = {1, 2, 3, 4};
    appended(decoder, prompt, 4, 0);
    const auto begins = [&](int count, int room) {
        return message_of<std::invalid_argument>([&] { decoder.begin_branches(count, room); });
    };
    const auto appends = [&](const std::vector<std::int32_t>& tokens, const std::vector<std::int32_t>& branches) {
        Logits logits(tokens.size() * static_cast<std::size_t>(model.spec.vocabulary));
        return message_of<std::invalid_argument>([&] {
            decoder.append_to_branches(tokens.data(), branches.data(), static_cast<int>(tokens.size()), logits.data());
        });
    };
    CHECK(says(appends({1}, {0}), "branch 0: there are 0"));
    CHECK(says(begins(0, 1), "count is 0; expected 1 to 65536 branches"));
    CHECK(says(begins(most_branches + 1, 1), "count is 65537"));
    CHECK(says(begins(1, 0), "room is 0; expected 1 to 8 tokens"));
    CHECK(says(begins(1, std::numeric_limits<int>::max()), "room is 2147483647"));
    CHECK(says(begins(2, 5), "branches of 5 tokens do not fit: the context of 8 holds 4 already"));
    CHECK(decoder.branch_bytes(3, 2) == 3 * decoder.cache_bytes(8) * 2);  // two tiles in place of one
    CHECK(begins(2, 2).empty());
    CHECK(says(appends({}, {}), "no tokens"));
    CHECK(says(appends({1, 37}, {0, 1}), "token id 37 is outside the vocabulary of 37"));
    CHECK(says(appends({1, 1}, {0, 2}), "branch 2: there are 2"));
    CHECK(says(appends({1, 1}, {0, -1}), "branch -1: there are 2"));
    CHECK(says(appends({1, 1}, {1, 1}), "branch 1 is named twice"));
    CHECK(appends({1}, {1}).empty());
    CHECK(appends({1, 1}, {0, 1}).empty());
    CHECK(says(appends({1, 1}, {0, 1}), "branch 1 is full: it has room for 2 tokens"));
    CHECK(appends({1}, {0}).empty());
    // Whatever changes the sequence ends its branches.
    const std::vector<std::uint8_t> bytes(decoder.cache_bytes(2));
    const std::function<void()> changes[] = {
        [&] { decoder.end_branches(); }, [&] { decoder.rewind(3); }, [&] { appended(decoder, prompt, 1, 0); },
        [&] { decoder.import_cache(bytes.data(), bytes.size(), 0, 2); }, [&] { decoder.set_adapters({}); }};
    for (const auto& change : changes) {
        CHECK(begins(1, 2).empty());
        change();
        CHECK(says(appends({1}, {0}), "branch 0: there are 0"));
    }
}

}  // namespace

void test_branches() {
    Random random(29);
    std::vector<std::string> sets = vector_sets();
    sets.push_back("scalar");
    std::vector<Model> models = families();
    models.push_back(ternary());
    for (std::uint64_t seed = 1; seed <= 5; ++seed) models.push_back(mixed(seed));
    for (const Model& model : models) test_model(model, sets, random);
    force(sets.front().c_str());
    Model window = base("a key head for two queries, a long window", 2, 1, 32);
    window.spec.windows = {0, attention_chunk - 20};
    for (const Model& model : {base("grouped queries", 4, 2, 32), window}) test_long_context(model, random);
    test_many(random);
    test_refusals();
    force("");
}

// Few branches and many, by threads that have heads of their own and threads that share them.
void test_branches_of_threads() {
    std::printf("branches of threads\n");
    force("scalar");
    const Model model = families()[2];
    Random random(31);
    const std::vector<std::int32_t> tokens = random_tokens(20, model.spec.vocabulary, random);
    for (const int threads : {2, 3}) {
        Decoder decoder(model.spec, WeightMaker(model, 30).made(), 30, CacheType::q8_0, true, threads);
        appended(decoder, tokens.data(), 20, 0);
        for (const int count : {3, 6}) {
            const std::vector<Continuation> all = continued_alone(decoder, count, 5, random);
            decoder.begin_branches(count, 5);
            check_branches(decoder, all, true, random);
        }
    }
    force("");
}
