// All classes of lanes give the specification's bits: for ordinary numbers, subnormals, infinities, NaN and ties.
#include "lanes_results.h"

#include "../../../quantlab/native/src/instruction_set.h"

#include <cmath>
#include <limits>

using quantlab::InstructionSet;

namespace {

float any_float(Random& random) {
    constexpr float inf = std::numeric_limits<float>::infinity();
    constexpr float special[] = {0.0f, -0.0f, inf, -inf, NAN, 0x1p-149f, -0x1p-130f, 0x1p-126f, 3.4e38f, 65504.0f, 65520.0f};
    switch (random.below(8)) {
        case 0:
            return special[random.below(std::size(special))];
        case 1:
            return std::bit_cast<float>(static_cast<std::uint32_t>(random.bits()));
        case 2:  // ties of rounding to whole numbers
            return static_cast<float>(random.below(400) - 200) / 2.0f;
        case 3:  // ties of rounding to halves
            return static_cast<float>(2 * random.below(2048) + 4097) * 0x1p-12f;
        case 4:  // halves' subnormals
            return static_cast<float>(random.below(4096) + 1) * 0x1p-25f;
        default:
            return random.real() * std::ldexp(1.0f, random.below(40) - 20);
    }
}

LaneInputs lane_inputs() {
    Random random(7);
    LaneInputs inputs;
    for (int i = 0; i < 48 * 2000; ++i) {
        inputs.floats.push_back(any_float(random));
    }
    for (int half = 0; half < 0x10000; ++half) {  // every half and every bfloat16
        inputs.bytes.push_back(static_cast<std::uint8_t>(half));
        inputs.bytes.push_back(static_cast<std::uint8_t>(half >> 8));
    }
    for (int i = 0; i < 64 * 500; ++i) {
        inputs.bytes.push_back(static_cast<std::uint8_t>(random.bits()));
    }
    return inputs;
}

void check_equal(const char* name, const Bits& found, const Bits& expected) {
    std::printf("lanes: %s\n", name);
    CHECK(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
        CHECK(found[i] == expected[i]);
    }
}

}  // namespace

void test_lanes() {
    const LaneInputs inputs = lane_inputs();
    const Bits expected = scalar_results(inputs);
    CHECK(!expected.empty());
    if (quantlab::can_run(InstructionSet::avx2)) {
        check_equal("avx2", avx2_results(inputs), expected);
    }
    if (quantlab::can_run(InstructionSet::avx512)) {
        check_equal("avx512", avx512_results(inputs), expected);
    }
}
