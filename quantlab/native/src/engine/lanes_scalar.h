// The specification of the lanes: see lanes.h.
#pragma once

#include "../numbers.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace quantlab::engine {

class ScalarLanes {
public:
    using L = ScalarLanes;
    static constexpr const char* name = "scalar";
    static constexpr int code_tile = 2;
    static constexpr int code_groups = 1;
    static constexpr int value_tile = 2;
    static constexpr int value_chains = 1;

    struct Mask {
        bool lanes[16];
    };

    static L load(const float* values) {
        L result;
        std::memcpy(result.lanes_, values, sizeof result.lanes_);
        return result;
    }

    static L load_half(const std::uint16_t* values) {
        return made([values](int i) { return float_from_half(values[i]); });
    }

    static L load_brain(const std::uint16_t* values) {
        return made([values](int i) { return float_from_brain(values[i]); });
    }

    static L load_int8(const std::int8_t* values) {
        return made([values](int i) { return static_cast<float>(values[i]); });
    }

    static L load_first(const float* values, int count) {
        return made([values, count](int i) { return i < count ? values[i] : 0.0f; });
    }

    static L broadcast(float value) {
        return made([value](int) { return value; });
    }

    static L zero() { return broadcast(0.0f); }

    void store(float* values) const { std::memcpy(values, lanes_, sizeof lanes_); }

    void store_half(std::uint16_t* values) const {
        for (int i = 0; i < 16; ++i) {
            values[i] = half_from_float(lanes_[i]);
        }
    }

    void store_int8(std::int8_t* values) const {
        for (int i = 0; i < 16; ++i) {
            values[i] = static_cast<std::int8_t>(lanes_[i]);
        }
    }

    void store_first(float* values, int count) const {
        for (int i = 0; i < count; ++i) {
            values[i] = lanes_[i];
        }
    }

    friend L operator+(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] + b.lanes_[i]; });
    }
    friend L operator-(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] - b.lanes_[i]; });
    }
    friend L operator*(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] * b.lanes_[i]; });
    }
    friend L operator/(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] / b.lanes_[i]; });
    }

    static L fma(const L& a, const L& b, const L& c) {
        return made([&](int i) { return std::fma(a.lanes_[i], b.lanes_[i], c.lanes_[i]); });
    }

    static L max(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] > b.lanes_[i] ? a.lanes_[i] : b.lanes_[i]; });
    }
    static L min(const L& a, const L& b) {
        return made([&](int i) { return a.lanes_[i] < b.lanes_[i] ? a.lanes_[i] : b.lanes_[i]; });
    }
    static L abs(const L& a) {
        return made([&](int i) { return std::fabs(a.lanes_[i]); });
    }
    static L sqrt(const L& a) {
        return made([&](int i) { return std::sqrt(a.lanes_[i]); });
    }
    static L round(const L& a) {
        return made([&](int i) { return std::nearbyint(a.lanes_[i]); });
    }

    static L scale_by_power_of_two(const L& a, const L& n) {
        return made([&](int i) {
            const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.lanes_[i]) + 127);
            return a.lanes_[i] * std::bit_cast<float>(exponent << 23);
        });
    }

    static Mask greater(const L& a, const L& b) {
        Mask mask;
        for (int i = 0; i < 16; ++i) {
            mask.lanes[i] = a.lanes_[i] > b.lanes_[i];
        }
        return mask;
    }

    static Mask equal(const L& a, const L& b) {
        Mask mask;
        for (int i = 0; i < 16; ++i) {
            mask.lanes[i] = a.lanes_[i] == b.lanes_[i];
        }
        return mask;
    }

    static L select(const Mask& mask, const L& a, const L& b) {
        return made([&](int i) { return mask.lanes[i] ? a.lanes_[i] : b.lanes_[i]; });
    }

    float fold_sum() const {
        return folded([](float a, float b) { return a + b; });
    }

    float fold_max() const {
        return folded([](float a, float b) { return a > b ? a : b; });
    }

    // Multiplications by quantized weights.

    struct Codes {
        std::uint8_t bytes[64];

        friend Codes operator|(const Codes& a, const Codes& b) {
            return a.each([&](int i) { return a.bytes[i] | b.bytes[i]; });
        }

        template <typename Byte>
        Codes each(const Byte& byte) const {
            Codes result;
            for (int i = 0; i < 64; ++i) {
                result.bytes[i] = static_cast<std::uint8_t>(byte(i));
            }
            return result;
        }
    };

    static Codes load_codes(const std::uint8_t* bytes) {
        Codes codes;
        std::memcpy(codes.bytes, bytes, sizeof codes.bytes);
        return codes;
    }

    static Codes low_nibbles(const Codes& codes) {
        return codes.each([&](int i) { return codes.bytes[i] & 0x0f; });
    }
    static Codes high_nibbles(const Codes& codes) {
        return codes.each([&](int i) { return codes.bytes[i] >> 4; });
    }
    static Codes fifth_bits(const Codes& codes, int bit) {
        return codes.each([&](int i) { return (codes.bytes[i] >> bit & 1) << 4; });
    }

    static Codes two_bits(const Codes& codes, int bit) {
        return codes.each([&](int i) { return codes.bytes[i] >> bit & 3; });
    }

    static L column(const Codes& codes, int i) {
        return made([&](int row) { return static_cast<float>(codes.bytes[4 * row + i]); });
    }

    template <int bits>
    static constexpr int planes = 1;

    template <int bits>
    class Dot {
    public:
        void add(const Codes& codes, int, const std::int8_t* four) {
            for (int row = 0; row < 16; ++row) {
                for (int i = 0; i < 4; ++i) {
                    sums_[row] += codes.bytes[4 * row + i] * four[i];
                }
            }
        }

        L total() const {
            return made([this](int row) { return static_cast<float>(sums_[row]); });
        }

    private:
        std::int32_t sums_[16] = {};
    };

private:
    template <typename Lane>
    static L made(const Lane& lane) {
        L result;
        for (int i = 0; i < 16; ++i) {
            result.lanes_[i] = lane(i);
        }
        return result;
    }

    template <typename Pair>
    float folded(const Pair& pair) const {
        float lanes[16];
        std::memcpy(lanes, lanes_, sizeof lanes);
        for (int half = 8; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) {
                lanes[i] = pair(lanes[i], lanes[i + half]);
            }
        }
        return lanes[0];
    }

    float lanes_[16];
};

}  // namespace quantlab::engine
