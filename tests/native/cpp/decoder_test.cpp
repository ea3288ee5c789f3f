// The decoder: the same bits however a sequence is cut, on every instruction set, and no way to crash it.
#include "check.h"
#include "decoder_cases.h"

#include "../../../quantlab/native/src/engine/decoder_checks.h"
#include "../../../quantlab/native/src/engine/decoder_scratch.h"
#include "../../../quantlab/native/src/engine/kv_cache.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>
#include <thread>

using namespace decoder_model;

namespace {

constexpr int whole_context = 100;

struct Settings {
    CacheType cache;
    bool int8;
};

// From where the decoder is to the end, in random pieces, with the logits of a random part of each.
void append_in_pieces(Decoder& decoder, const std::vector<std::int32_t>& tokens, const Logits& expected, int longest,
                      Random& random) {
    const int all = static_cast<int>(tokens.size());
    while (decoder.position() < all) {
        const int start = decoder.position(), count = 1 + random.below(std::min(longest, all - start));
        const Logits found = appended(decoder, tokens.data() + start, count, random.below(count + 1));
        CHECK(decoder.position() == start + count);
        check_rows(found, expected, start + count, decoder.spec().vocabulary);
    }
}

void test_pieces(const Model& model, const DecoderWeights& weights, const std::vector<LayerAdapters>& adapters,
                 const Settings& settings, const std::vector<std::int32_t>& tokens, const Logits& expected, Random& random) {
    const int all = static_cast<int>(tokens.size());
    Decoder decoder(model.spec, weights, whole_context, settings.cache, settings.int8, 1 + random.below(3));
    decoder.set_adapters(adapters);
    check_rows(appended(decoder, tokens.data(), all, all), expected, all, model.spec.vocabulary);
    decoder.rewind(0);
    append_in_pieces(decoder, tokens, expected, all, random);
    // Something else, forgotten again.
    const int kept = random.below(all);
    decoder.rewind(kept);
    const std::vector<std::int32_t> others = random_tokens(1 + random.below(20), model.spec.vocabulary, random);
    appended(decoder, others.data(), static_cast<int>(others.size()), 1);
    decoder.rewind(kept);
    append_in_pieces(decoder, tokens, expected, 3, random);
    // Carried over to a decoder that the sequence fills.
    decoder.rewind(std::max(1, kept));
    std::vector<std::uint8_t> bytes(decoder.cache_bytes(decoder.position()));
    decoder.export_cache(bytes.data(), bytes.size(), 0, decoder.position());
    Decoder other(model.spec, weights, all, settings.cache, settings.int8, 2);
    other.set_adapters(adapters);
    other.import_cache(bytes.data(), bytes.size(), 0, decoder.position());
    append_in_pieces(other, tokens, expected, all, random);
    // A part, in place of something else.
    const int first = random.below(all / tile_positions + 1) * tile_positions;
    std::vector<std::uint8_t> part(other.cache_bytes(all - first));
    other.export_cache(part.data(), part.size(), first, all);
    decoder.rewind(0);
    append_in_pieces(decoder, {tokens.begin(), tokens.begin() + first}, expected, all, random);
    for (const std::int32_t& other_token : others) {
        if (decoder.position() < all) appended(decoder, &other_token, 1, 0);
    }
    decoder.import_cache(part.data(), part.size(), first, all);
    decoder.rewind(std::max(first, all - 5));
    append_in_pieces(decoder, tokens, expected, 3, random);
    CHECK(other.position() == other.context());
}

void test_model(const Model& model, const std::vector<std::string>& sets, Random& random) {
    std::printf("decoder: %s\n", model.name.c_str());
    for (const CacheType cache : cache_types) {
        const Settings settings{cache, random.below(2) == 1};
        // More than 64 are computed in several passes.
        const int count = cache == CacheType::f16 ? 66 + random.below(20) : 2 + random.below(30);
        const std::vector<std::int32_t> tokens = random_tokens(count, model.spec.vocabulary, random);
        force("scalar");
        const DecoderWeights weights = WeightMaker(model, whole_context).made();
        const int rank = random.below(10);  // none at times
        const std::vector<LayerAdapters> adapters = AdapterMaker(model.spec, rank, random).made();
        Decoder decoder(model.spec, weights, whole_context, cache, settings.int8, 1);
        decoder.set_adapters(adapters);
        const Logits expected = appended(decoder, tokens.data(), count, count);
        CHECK(std::all_of(expected.begin(), expected.end(), [](float logit) { return std::isfinite(logit); }));
        decoder.rewind(0);
        append_in_pieces(decoder, tokens, expected, 9, random);
        for (const std::string& set : sets) {
            force(set.c_str());
            test_pieces(model, WeightMaker(model, whole_context).made(), adapters, settings, tokens, expected, random);
        }
    }
}

// Attention over several chunks of positions: threads with heads of their own, and threads that share a head's chunks.
void test_long_context(const Model& model, const std::vector<std::string>& sets, Random& random) {
    std::printf("decoder: long context, %s\n", model.name.c_str());
    const int context = attention_chunk + 200, prompt = context - 20, vocabulary = model.spec.vocabulary;
    const std::vector<std::int32_t> tokens = random_tokens(context, vocabulary, random);
    force(sets.empty() ? "scalar" : sets.front().c_str());
    const DecoderWeights weights = WeightMaker(model, context).made();
    for (const CacheType cache : cache_types) {
        Decoder alone(model.spec, weights, context, cache, true, 1);
        appended(alone, tokens.data(), prompt, 0);
        std::vector<std::uint8_t> bytes(alone.cache_bytes(prompt));
        alone.export_cache(bytes.data(), bytes.size(), 0, prompt);
        const Logits last = appended(alone, tokens.data() + prompt, context - prompt, context - prompt);
        Logits expected(static_cast<std::size_t>(prompt) * static_cast<std::size_t>(vocabulary));
        expected.insert(expected.end(), last.begin(), last.end());
        for (const int threads : {2, 3}) {
            Decoder decoder(model.spec, weights, context, cache, true, threads);
            appended(decoder, tokens.data(), prompt, 0);
            append_in_pieces(decoder, tokens, expected, 9, random);
        }
        force("scalar");
        Decoder portable(model.spec, WeightMaker(model, context).made(), context, cache, true, 2);
        portable.import_cache(bytes.data(), bytes.size(), 0, prompt);
        append_in_pieces(portable, tokens, expected, 9, random);
        force(sets.empty() ? "scalar" : sets.front().c_str());
    }
}

// A rank so large that threads divide the products of few tokens; then others, and none.
void test_adapters(Random& random) {
    std::printf("decoder: adapters\n");
    const Model model = families()[2];
    const DecoderWeights weights = WeightMaker(model, 16).made();
    const std::vector<std::int32_t> tokens = random_tokens(9, model.spec.vocabulary, random);
    Decoder decoder(model.spec, weights, 16, CacheType::f16, true, 3);
    const Logits plain = appended(decoder, tokens.data(), 9, 9);
    for (const int rank : {least_divided_products / model.spec.hidden + 5, 7}) {
        const std::vector<LayerAdapters> adapters = AdapterMaker(model.spec, rank, random).made();
        Decoder alone(model.spec, weights, 16, CacheType::f16, true, 1);
        alone.set_adapters(adapters);
        const Logits expected = appended(alone, tokens.data(), 9, 9);
        CHECK(expected != plain);
        decoder.set_adapters(adapters);
        CHECK(decoder.position() == 0);
        append_in_pieces(decoder, tokens, expected, 4, random);
        decoder.rewind(0);
        append_in_pieces(decoder, tokens, expected, 9, random);
    }
    decoder.set_adapters({});
    append_in_pieces(decoder, tokens, plain, 4, random);
}

// Refused calls leave the sequence as it was.
void test_refusals() {
    const Model model = families()[2];
    Decoder decoder(model.spec, WeightMaker(model, 8).made(), 8, CacheType::f16, true, 2);
    const std::vector<std::int32_t> tokens{1, 2, 3, 4, 5, 6};
    const Logits expected = appended(decoder, tokens.data(), 6, 6);
    decoder.rewind(4);
    const auto refused = [&](std::vector<std::int32_t> ids, int wanted, const char* message) {
        CHECK(says(message_of<std::invalid_argument>([&] { appended(decoder, ids.data(), static_cast<int>(ids.size()), wanted); }), message));
        CHECK(decoder.position() == 4);
    };
    refused({}, 0, "no tokens");
    refused({1, 37}, 1, "token id 37 is outside the vocabulary of 37");
    refused({-1}, 1, "token id -1");
    refused({1, 2, 3, 4, 5}, 1, "5 tokens do not fit: the context of 8 holds 4");
    refused({1}, 2, "logits has 2 rows");
    CHECK(head_cache_bytes(CacheType::f32, 64, 17) == 32 * 64 * 4);  // whole tiles of 16 positions
    CHECK(head_cache_bytes(CacheType::f16, 64, 16) == 16 * 64 * 2);
    CHECK(head_cache_bytes(CacheType::q8_0, 64, 17) == 32 * 64 / 32 * 34);
    std::vector<std::uint8_t> bytes(decoder.cache_bytes(8) + 1);
    const auto refused_bytes = [&](std::size_t size, int first, int last, const char* message) {
        CHECK(says(message_of<std::invalid_argument>([&] { decoder.import_cache(bytes.data(), size, first, last); }), message));
    };
    constexpr int most = std::numeric_limits<int>::max();
    refused_bytes(bytes.size(), 0, 8, "expected");
    refused_bytes(bytes.size() - 1, 0, 9, "9 positions do not fit a context of 8");
    refused_bytes(0, 0, -1, "last is -1; expected 0 or more");
    refused_bytes(0, 0, most, "do not fit");
    refused_bytes(0, -16, 0, "first is -16; expected a multiple of 16 up to 4");
    refused_bytes(0, 4, 4, "first is 4");
    refused_bytes(0, 16, 16, "first is 16");
    refused_bytes(0, most, most, "first is 2147483647");
    const auto refused_export = [&](std::size_t size, int first, int last, const char* message) {
        CHECK(says(message_of<std::invalid_argument>([&] { decoder.export_cache(bytes.data(), size, first, last); }), message));
    };
    refused_export(3, 0, 4, "bytes has 3 bytes");
    refused_export(bytes.size() - 1, 0, 5, "last is 5: the sequence has 4 tokens");
    refused_export(0, 16, 4, "first is 16");
    refused_export(0, 0, -5, "last is -5; expected 0 or more");
    CHECK(says(message_of<std::invalid_argument>([&] { decoder.rewind(5); }), "position 5"));
    CHECK(says(message_of<std::invalid_argument>([&] { decoder.rewind(-1); }), "position -1"));
    check_rows(appended(decoder, tokens.data() + 4, 2, 2), expected, 6, model.spec.vocabulary);
}

// A cache of any bytes, as a damaged file would have it: numbers come out, whatever they are.
void test_any_cache(CacheType cache, Random& random) {
    for (const Model& model : families()) {
        Decoder decoder(model.spec, WeightMaker(model, 40).made(), 40, cache, true, 1);
        std::vector<std::uint8_t> bytes(decoder.cache_bytes(33));
        for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.bits());
        decoder.import_cache(bytes.data(), bytes.size(), 0, 33);
        const std::int32_t token = 1;
        appended(decoder, &token, 1, 1);
    }
}

// Weights that are not finite give logits that are not, or others; never a code out of range.
void test_weights_that_are_not_finite() {
    for (const float value : {INFINITY, -INFINITY, NAN, 3e38f, 1e-42f}) {
        for (const CacheType cache : cache_types) {
            const Model model = families()[2];
            DecoderWeights weights = WeightMaker(model, 8).made();
            weights.layers[0].attention_norm.weight.assign(32, value);
            std::vector<Logits> found;
            for (const char* set : {"scalar", ""}) {
                force(set);
                Decoder decoder(model.spec, weights, 8, cache, false, 1);
                const std::vector<std::int32_t> tokens{1, 2, 3};
                found.push_back(appended(decoder, tokens.data(), 3, 3));
            }
            check_rows(found[0], found[1], 3, model.spec.vocabulary);
        }
    }
}

// Every number of a spec replaced by others: refused by an exception, or computed with.
void test_any_spec(Random& random) {
    const auto any_number = [&] {
        constexpr int ends[] = {0, 1, -1, 2, 16, 17, 32, 64, 1 << 16, 1 << 24, std::numeric_limits<int>::max(), std::numeric_limits<int>::min()};
        return random.below(3) == 0 ? static_cast<int>(random.bits()) : ends[random.below(std::size(ends))];
    };
    int refused = 0, computed = 0;
    for (int round = 0; round < 1500; ++round) {
        const std::vector<Model> models = families();
        const Model& model = models[static_cast<std::size_t>(random.below(static_cast<int>(models.size())))];
        static std::vector<std::pair<std::string, DecoderWeights>> made;
        auto at = std::find_if(made.begin(), made.end(), [&](const auto& each) { return each.first == model.name; });
        if (at == made.end()) at = made.insert(made.end(), {model.name, WeightMaker(model, 8).made()});
        DecoderSpec d = model.spec;
        int context = 8, cache = random.below(3), threads = 1;
        int* const numbers[] = {&d.layers, &d.hidden, &d.heads, &d.kv_heads, &d.head_size, &d.inner, &d.vocabulary, &d.rotated,
                                &d.windows[0], &d.windows[1], &d.rope_tables[1], &context, &cache, &threads};
        for (int changes = random.below(3); changes >= 0; --changes) {
            const int which = random.below(std::size(numbers) + 4);
            if (which < static_cast<int>(std::size(numbers))) {
                *numbers[which] = any_number();
            } else if (which % 4 == 0) {
                d.norm = static_cast<Norm>(any_number());
            } else if (which % 4 == 1) {
                d.activation = static_cast<Activation>(any_number());
            } else {
                (which % 4 == 2 ? d.gated : d.parallel_residual) ^= true;
            }
        }
        if (context > 1000 || threads > 8) {  // allowed, but not to be paid for here
            continue;
        }
        const std::string message = message_of<std::invalid_argument>([&] {
            Decoder decoder(d, at->second, context, static_cast<CacheType>(cache), true, threads);
            const std::int32_t token = 0;
            appended(decoder, &token, 1, 1);
            ++computed;
        });
        refused += !message.empty();
    }
    CHECK(refused > 500);
    CHECK(computed > 50);
}

void test_wrong_adapters(Random& random) {
    const Model llama = families()[2], gpt2 = families()[0];
    const auto refused = [&](const Model& model, const std::function<void(std::vector<LayerAdapters>&)>& spoil, const char* message) {
        Decoder decoder(model.spec, WeightMaker(model, 8).made(), 8, CacheType::f16, true, 1);
        const std::int32_t tokens[] = {1, 2};
        appended(decoder, tokens, 2, 0);
        std::vector<LayerAdapters> adapters = AdapterMaker(model.spec, 3, random).made();
        spoil(adapters);
        const std::string found = message_of<std::invalid_argument>([&] { decoder.set_adapters(adapters); });
        if (!says(found, message)) std::fprintf(stderr, "found: %s\nexpected: %s\n", found.c_str(), message);
        CHECK(says(found, message));
        CHECK(decoder.position() == 2);
    };
    refused(llama, [](auto& a) { a.pop_back(); }, "adapters has 1 entries; expected one for each of 2 layers");
    refused(llama, [](auto& a) { a[1].down.a.pop_back(); }, "adapter of layer 1: down: a has 191 elements; expected [3, 64]");
    refused(llama, [](auto& a) { a[0].inner.rank = -1; }, "adapter of layer 0: inner: rank is -1; expected 0 to");
    refused(llama, [](auto& a) { a[0].attention.rank = most_adapter_rank + 1; }, "attention: rank is 65537; expected 0 to 65536");
    refused(llama, [](auto& a) { a[0].key_rows = {0, 4, {}}; }, "key: rank is 4; expected 0 to 3");
    refused(llama, [](auto& a) { a[0].key_rows = {2, 2, std::vector<float>(128)}; }, "key: first is 2; expected 0 to 1");
    refused(llama, [](auto& a) { a[0].key_rows = {-1, 0, {}}; }, "key: first is -1; expected 0 to 3");
    refused(llama, [](auto& a) { a[0].key_rows = {1, 2, std::vector<float>(127)}; }, "key: b has 127 elements; expected [64, 2]");
    refused(gpt2, [](auto& a) { a[0].gate_rows = {0, 1, std::vector<float>(64)}; }, "gate: b has 64 elements; expected [0, 1]");
}

void test_wrong_weights() {
    const auto refused = [](const Model& model, const std::function<void(DecoderWeights&)>& spoil, const char* message) {
        DecoderWeights weights = WeightMaker(model, 8).made();
        spoil(weights);
        const std::string found = message_of<std::invalid_argument>([&] { Decoder(model.spec, weights, 8, CacheType::f16, true, 1); });
        if (!says(found, message)) std::fprintf(stderr, "found: %s\nexpected: %s\n", found.c_str(), message);
        CHECK(says(found, message));
    };
    const Model gpt2 = families()[0], llama = families()[2], gemma = families()[6];
    refused(llama, [](auto& w) { w.layers[1].key.weight = w.layers[1].query.weight; }, "layer 1: key has shape [256, 32]; expected [64, 32]");
    refused(llama, [](auto& w) { w.layers[0].gate.weight = nullptr; }, "layer 0: gate missing; expected [64, 32]");
    refused(llama, [](auto& w) { w.layers[0].down.bias.resize(31); }, "layer 0: down.bias has 31 elements; expected 32");
    refused(llama, [](auto& w) { w.head.weight = w.layers[0].up.weight; }, "head has shape [64, 32]; expected [37, 32]");
    refused(llama, [](auto& w) { w.embedding = nullptr; }, "embedding missing; expected [37, 32]");
    refused(llama, [](auto& w) { w.layers.pop_back(); }, "weights has 1 entries; expected one for each of 2 layers");
    refused(llama, [](auto& w) { w.cosines[0].pop_back(); }, "rotary table 0 has 127 angles; expected 128 for a context of 8");
    refused(gemma, [](auto& w) { w.sines.pop_back(), w.cosines.pop_back(); }, "a layer's rotary table is 1; expected 0 to 0");
    refused(gemma, [](auto& w) { w.layers[0].query_norm.weight.pop_back(); }, "layer 0: query_norm.weight has 63 elements; expected 64");
    refused(gpt2, [](auto& w) { w.layers[0].gate = w.layers[0].up; }, "layer 0: gate is given; expected none");
    refused(gpt2, [](auto& w) { w.layers[0].gate.bias.resize(4000); }, "layer 0: gate is given; expected none");
    refused(gpt2, [](auto& w) { w.final_norm.bias.clear(); }, "final_norm.bias has 0 elements; expected 32");
    refused(gpt2, [](auto& w) { w.positions = w.layers[0].up.weight; w.positions = std::make_shared<PackedMatrix>(WeightType::f32, 7, 32); }, "positions has shape [7, 32]; expected [8, 32] or more rows");
}

// Decoders that share their weights, each with threads of its own, side by side.
void test_shared_weights(const Model& model) {
    const DecoderWeights weights = WeightMaker(model, 40).made();
    Random random(5);
    const std::vector<std::int32_t> tokens = random_tokens(40, model.spec.vocabulary, random);
    const int wide = least_divided_products / model.spec.hidden;  // of few tokens, products that threads divide
    const std::vector<LayerAdapters> adapters = AdapterMaker(model.spec, wide, random).made();
    Decoder alone(model.spec, weights, 40, CacheType::f16, true, 1);
    alone.set_adapters(adapters);
    const Logits expected = appended(alone, tokens.data(), 40, 40);
    std::vector<std::thread> users;
    for (int user = 0; user < 2; ++user) {
        users.emplace_back([&, user] {
            Random mine(static_cast<std::uint64_t>(user));
            Decoder decoder(model.spec, weights, 40, CacheType::f16, true, 2 + user);
            decoder.set_adapters(adapters);
            for (int round = 0; round < 3; ++round) {
                decoder.rewind(0);
                append_in_pieces(decoder, tokens, expected, 40, mine);
            }
        });
    }
    for (std::thread& user : users) user.join();
}

}  // namespace

void test_decoder() {
    const std::vector<std::string> sets = vector_sets();
    Random random(23);
    std::vector<Model> models = families();
    models.push_back(ternary());
    for (std::uint64_t seed = 1; seed <= 5; ++seed) models.push_back(mixed(seed));
    for (const Model& model : models) test_model(model, sets, random);
    const Model grouped = base("grouped queries", 4, 2, 32);
    Model window = base("a key head for two queries, a long window", 2, 1, 32);
    window.spec.windows = {0, attention_chunk + 50};
    for (const Model& model : {grouped, window}) test_long_context(model, sets, random);
    force("");
    std::printf("decoder: refusals\n");
    test_refusals();
    test_wrong_weights();
    test_wrong_adapters(random);
    test_adapters(random);
    test_any_spec(random);
    test_weights_that_are_not_finite();
    for (const CacheType cache : cache_types) test_any_cache(cache, random);
}

// Then one decoder with two users, of whom the second is told.
void test_decoders_side_by_side() {
    std::printf("decoders side by side\n");
    force("scalar");
    const Model model = families()[5];
    for (const Model& each : {model, ternary()}) test_shared_weights(each);
    Random random(5);
    const std::vector<std::int32_t> tokens = random_tokens(40, model.spec.vocabulary, random);
    Decoder shared(model.spec, WeightMaker(model, 40).made(), 40, CacheType::f16, true, 2);
    std::atomic<int> added = 0;
    const auto use = [&] {
        for (int i = 0; i < 20; ++i) {
            try {
                appended(shared, tokens.data(), 1, 1);
                ++added;
            } catch (const std::runtime_error& error) {
                CHECK(says(error.what(), "in use by another thread"));
            }
        }
    };
    std::thread first(use), second(use);
    first.join();
    second.join();
    CHECK(added >= 1);
    CHECK(shared.position() == added);
}
