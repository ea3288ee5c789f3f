// What the processor can run, asked once, and what the environment asks for, each time.
#include "instruction_set.h"

#include <cstdlib>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace quantlab {

namespace {

struct Features {
    bool avx2 = false;
    bool avx_vnni = false;
    bool avx512 = false;
};

#if defined(__x86_64__) && defined(__GNUC__)

struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf leaf(unsigned number, unsigned sub = 0) {
    Leaf found;
    __get_cpuid_count(number, sub, &found.a, &found.b, &found.c, &found.d);
    return found;
}

bool has(unsigned word, int bit) { return (word >> bit & 1u) != 0; }

// The instructions count only if the operating system keeps the registers they use. Bits: Intel's manual, volume 2,
// CPUID; volume 1, XCR0.
Features found_features() {
    const Leaf basic = leaf(1);
    constexpr int fma = 12, osxsave = 27, f16c = 29;  // ecx
    if (!has(basic.c, osxsave) || !has(basic.c, fma) || !has(basic.c, f16c)) {
        return {};
    }
    unsigned kept = 0, unused = 0;
    __asm__("xgetbv" : "=a"(kept), "=d"(unused) : "c"(0));
    constexpr unsigned ymm = 0x06, zmm = 0xe6;  // XCR0
    const Leaf extended = leaf(7);
    constexpr int avx2 = 5, avx512f = 16, avx512bw = 30, avx512vl = 31;  // ebx
    constexpr int avx512vnni = 11;                                      // ecx
    constexpr int avx_vnni = 4;                                         // leaf 7, 1: eax
    Features features;
    features.avx2 = (kept & ymm) == ymm && has(extended.b, avx2);
    features.avx_vnni = features.avx2 && extended.a >= 1 && has(leaf(7, 1).a, avx_vnni);
    features.avx512 = features.avx2 && (kept & zmm) == zmm && has(extended.b, avx512f) &&
                      has(extended.b, avx512bw) && has(extended.b, avx512vl) && has(extended.c, avx512vnni);
    return features;
}

#else

Features found_features() { return {}; }

#endif

const Features& features() {
    static const Features found = found_features();
    return found;
}

}  // namespace

bool can_run(InstructionSet set) {
    switch (set) {
        case InstructionSet::scalar:
            return true;
        case InstructionSet::avx2:
            return features().avx2;
        case InstructionSet::avx512:
            return features().avx512;
    }
    return false;
}

bool has_avx_vnni() { return features().avx_vnni; }

std::optional<InstructionSet> chosen_instruction_set() {
    const char* forced = std::getenv(kernel_variable);
    const std::string_view wanted = forced == nullptr ? "" : forced;
    for (const InstructionSet set : {InstructionSet::avx512, InstructionSet::avx2, InstructionSet::scalar}) {
        if (can_run(set) && (wanted.empty() || wanted == name_of(set))) {
            return set;
        }
    }
    return std::nullopt;
}

}  // namespace quantlab
