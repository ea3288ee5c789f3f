// What tests of the decoder share: forced instruction sets, tokens and their logits, refusals.
#pragma once

#include "decoder_model.h"

#include "../../../quantlab/native/src/instruction_set.h"

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace decoder_model {

using quantlab::can_run;
using quantlab::InstructionSet;

inline constexpr CacheType cache_types[] = {CacheType::f32, CacheType::f16, CacheType::q8_0};

// Weights and decoders take the instruction set that is forced when they are made.
inline void force(const char* set) { CHECK(setenv(quantlab::kernel_variable, set, 1) == 0); }

inline std::vector<std::string> vector_sets() {
    std::vector<std::string> sets;
    if (can_run(InstructionSet::avx2)) sets.push_back("avx2");
    if (can_run(InstructionSet::avx512)) sets.push_back("avx512");
    return sets;
}

inline std::vector<std::int32_t> random_tokens(int count, int vocabulary, Random& random) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
    for (std::int32_t& token : tokens) token = random.below(vocabulary);
    return tokens;
}

using Logits = std::vector<float>;

// Buffers of exactly the size that is asked for.
inline Logits appended(Decoder& decoder, const std::int32_t* tokens, int count, int wanted) {
    const std::vector<std::int32_t> exact(tokens, tokens + count);
    Logits logits(static_cast<std::size_t>(wanted) * static_cast<std::size_t>(decoder.spec().vocabulary), -1.0f);
    decoder.append(exact.data(), count, logits.data(), wanted);
    return logits;
}

// `found` are the logits after the tokens before `end`.
inline void check_rows(const Logits& found, const Logits& expected, int end, int vocabulary) {
    const std::size_t start = static_cast<std::size_t>(end) * static_cast<std::size_t>(vocabulary) - found.size();
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(same_bits(found[i], expected[start + i]));
}

template <typename Error>
std::string message_of(const std::function<void()>& work) {
    try {
        work();
    } catch (const Error& error) {
        return error.what();
    }
    return "";
}

inline bool says(const std::string& message, const char* part) { return message.find(part) != std::string::npos; }

}  // namespace decoder_model
