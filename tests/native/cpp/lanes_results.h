// What every operation of a class of lanes gives for the same inputs, as bits. Included by one file per instruction
// set, as the kernels are; the test compares the results.
#pragma once

#include "../../../quantlab/native/src/engine/lanes.h"
#include "check.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

using Bits = std::vector<std::uint32_t>;

// All numbers are drawn before: `floats` in pairs of 16, `bytes` at random.
struct LaneInputs {
    std::vector<float> floats;
    std::vector<std::uint8_t> bytes;
};

template <typename L>
class LaneResults {
public:
    static Bits of(const LaneInputs& inputs) {
        LaneResults results;
        for (std::size_t i = 0; i + 48 <= inputs.floats.size(); i += 48) {
            results.arithmetic(inputs.floats.data() + i);
        }
        for (std::size_t i = 0; i + 64 <= inputs.bytes.size(); i += 64) {
            results.conversions(inputs.bytes.data() + i);
            results.codes(inputs.bytes.data() + i);
        }
        for (int count = 0; count <= 16; ++count) {
            results.partial(inputs.floats.data(), count);
        }
        return results.bits_;
    }

private:
    void keep(float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits_.push_back(value != value ? 0x7fc00000u : bits);  // one NaN is like another
    }

    void keep(const L& lanes) {
        float values[16];
        lanes.store(values);
        for (const float value : values) {
            keep(value);
        }
    }

    void arithmetic(const float* values) {
        const L a = L::load(values);
        const L b = L::load(values + 16);
        const L c = L::load(values + 32);
        keep(a + b);
        keep(a - b);
        keep(a * b);
        keep(a / b);
        keep(L::fma(a, b, c));
        keep(L::max(a, b));
        keep(L::min(a, b));
        keep(L::abs(a));
        keep(L::sqrt(a));
        keep(L::round(a));
        keep(L::select(L::greater(a, b), a, c));
        keep(L::select(L::equal(a, b), a, c));
        keep(a.fold_sum());
        keep(a.fold_max());
        keep(L::broadcast(values[5]));
        keep(L::zero());
        // Whole numbers from -126 to 127.
        const L limit = L::broadcast(126.0f);
        const L bounded = L::min(L::max(b, L::zero() - limit), limit);
        keep(L::scale_by_power_of_two(a, L::round(bounded)));
        std::uint16_t halves[16];
        a.store_half(halves);
        for (const std::uint16_t half : halves) {
            bits_.push_back((half & 0x7fffu) > 0x7c00u ? 0x7e00u : half);
        }
        std::int8_t bytes[16];
        L::round(bounded).store_int8(bytes);
        for (const std::int8_t byte : bytes) {
            bits_.push_back(static_cast<std::uint32_t>(byte));
        }
    }

    void conversions(const std::uint8_t* bytes) {
        std::uint16_t halves[16];
        std::memcpy(halves, bytes, sizeof halves);
        keep(L::load_half(halves));
        keep(L::load_brain(halves));
        std::int8_t small[16];
        std::memcpy(small, bytes + 32, sizeof small);
        keep(L::load_int8(small));
    }

    void codes(const std::uint8_t* bytes) {
        const auto all = L::load_codes(bytes);
        for (int i = 0; i < 4; ++i) {
            keep(L::column(all, i));
            keep(L::column(L::low_nibbles(all), i));
            keep(L::column(L::high_nibbles(all), i));
        }
        keep_fifth_bits(all);
        std::int8_t activations[32];
        for (int i = 0; i < 32; ++i) {
            activations[i] = static_cast<std::int8_t>(bytes[i] == 128 ? 127 : bytes[i]);
        }
        keep(dot<4>(L::low_nibbles(all), activations));
        keep(dot<5>(L::low_nibbles(all) | L::fifth_bits(all, 2), activations));
        keep(dot<8>(all, activations));
        keep_two_bits(all, activations);
    }

    // Shifts want constants.
    void keep_fifth_bits(const typename L::Codes& codes) {
        keep(L::column(L::fifth_bits(codes, 0), 0));
        keep(L::column(L::fifth_bits(codes, 3), 1));
        keep(L::column(L::fifth_bits(codes, 4), 2));
        keep(L::column(L::fifth_bits(codes, 7), 3));
    }

    void keep_two_bits(const typename L::Codes& all, const std::int8_t* activations) {
        const typename L::Codes planes[] = {L::two_bits(all, 0), L::two_bits(all, 2), L::two_bits(all, 4), L::two_bits(all, 6)};
        typename L::template Dot<2> sum;
        for (int i = 0; i < 32; ++i) {
            sum.add(planes[i / 8], 0, activations + 4 * (i % 8));
        }
        keep(sum.total());
        for (int i = 0; i < 4; ++i) {
            keep(L::column(planes[i], 3 - i));
        }
    }

    template <int bits>
    static L dot(const typename L::Codes& codes, const std::int8_t* activations) {
        typename L::template Dot<bits> sum;
        if constexpr (L::template planes<bits> == 2) {
            for (int i = 0; i < 16; ++i) {
                sum.add(i < 8 ? L::low_nibbles(codes) : L::high_nibbles(codes), i, activations + 4 * (i % 8));
            }
        } else {
            for (int i = 0; i < 8; ++i) {
                sum.add(codes, i, activations + 4 * i);
            }
        }
        return sum.total();
    }

    // Memory that is just long enough, for a sanitizer to watch over.
    void partial(const float* values, int count) {
        const std::vector<float> read(values, values + count);
        keep(L::load_first(read.data(), count));
        std::vector<float> written(static_cast<std::size_t>(count));
        L::load(values).store_first(written.data(), count);
        for (const float value : written) {
            keep(value);
        }
    }

    Bits bits_;
};

// Empty where this build or this processor lacks the instruction set.
Bits scalar_results(const LaneInputs& inputs);
Bits avx2_results(const LaneInputs& inputs);
Bits avx512_results(const LaneInputs& inputs);
