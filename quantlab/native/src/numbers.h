// The number types weights come in, and the scalar arithmetic that every kernel shares.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace quantlab {

// float32, IEEE half precision, and bfloat16 (the upper half of a float32).
enum class Element : std::int32_t { f32, f16, bf16 };

inline constexpr std::int32_t element_count = 3;
inline constexpr std::string_view element_names[element_count] = {"f32", "f16", "bf16"};

constexpr std::int64_t element_bytes(Element element) { return element == Element::f32 ? 4 : 2; }

inline constexpr std::uint32_t infinity_bits = 0x7f800000u;
inline constexpr std::uint16_t half_infinity_bits = 0x7c00;
inline constexpr std::uint16_t half_nan_bits = 0x7e00;

// Nearest half-precision number, ties to even; beyond the largest, infinity.
inline std::uint16_t half_from_float(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > infinity_bits) {  // NaN: made quiet
        half = half_nan_bits | ((magnitude >> 13) & 0x3ffu);
    } else if (magnitude >= 0x477ff000u) {  // 65520 is half-way from the largest half to the next power of two
        half = half_infinity_bits;
    } else if (magnitude < 0x38800000u) {  // below 2^-14, where halves are 2^-24 apart, as floats from 0.5 to 1 are
        half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    } else {  // round the 13 dropped bits to even, then move the exponent's bias from 127 to 15
        half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    }
    return static_cast<std::uint16_t>(sign | half);
}

inline float float_from_half(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16;
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    std::uint32_t bits;
    if (magnitude >= 0x0f800000u) {  // infinity and NaN
        bits = magnitude | infinity_bits;
    } else if (magnitude < 0x00800000u) {  // subnormal: its mantissa counts steps of 2^-24
        bits = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude >> 13) * 0x1p-24f);
    } else {
        bits = magnitude + 0x38000000u;
    }
    return std::bit_cast<float>(sign | bits);
}

// Nearest bfloat16, ties to even; NaN is made quiet, since its payload may lie in the dropped bits alone.
inline std::uint16_t brain_from_float(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7fffffffu) > infinity_bits) {
        return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    }
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_brain(std::uint16_t brain) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(brain) << 16);
}

// Elements are read and written through memcpy: rows of a mapped file may lie at any address.
template <Element element>
float load_element(const std::uint8_t* bytes) {
    if constexpr (element == Element::f32) {
        float value;
        std::memcpy(&value, bytes, sizeof value);
        return value;
    } else {
        std::uint16_t bits;
        std::memcpy(&bits, bytes, sizeof bits);
        return element == Element::f16 ? float_from_half(bits) : float_from_brain(bits);
    }
}

template <Element element>
void store_element(float value, std::uint8_t* bytes) {
    if constexpr (element == Element::f32) {
        std::memcpy(bytes, &value, sizeof value);
    } else {
        const std::uint16_t bits = element == Element::f16 ? half_from_float(value) : brain_from_float(value);
        std::memcpy(bytes, &bits, sizeof bits);
    }
}

// A scale so small that its inverse is beyond fp32 is zero in half precision: all codes of its block are 0, which is
// also what ggml's and numpy's conversions of infinity and NaN to a code give on x86.
inline bool is_vanishing(float scale) { return scale != 0.0f && std::isinf(1.0f / scale); }

inline float inverse_or_zero(float scale) { return scale == 0.0f || is_vanishing(scale) ? 0.0f : 1.0f / scale; }

// Signed codes reach as far below zero as above; the codes of the other formats are cut off at the last.
inline float largest_signed_code(std::int32_t levels) { return static_cast<float>((levels - 1) / 2); }

inline float last_code(std::int32_t levels) { return static_cast<float>(levels - 1); }

}  // namespace quantlab
