// Thirty-two weights in four vectors of AVX2: loading, storing, extremes and sums. For avx2_kernel.cpp alone.
//
// The functions carry the instruction set as an attribute, so that nothing else in the build may use it. Fused
// multiply-add is left out on purpose. MAXPS and MINPS return their second operand when one is NaN or both are zeros,
// which is what the portable variant's `a > b ? a : b` and `a < b ? a : b` do.
#pragma once

#include "kernels.h"

#include <immintrin.h>

#include <cstdint>

#define QUANTLAB_AVX2 __attribute__((target("avx2,f16c")))
#define QUANTLAB_AVX2_INLINE __attribute__((target("avx2,f16c"), always_inline)) inline

namespace quantlab::avx2 {

// The 32 weights of a block, and codes beside them.
struct Weights {
    __m256 parts[4];
};

struct Codes {
    __m256i parts[4];
};

template <Element element>
QUANTLAB_AVX2_INLINE __m256 load_eight(const std::uint8_t* bytes) {
    if constexpr (element == Element::f32) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes));
    } else {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        if constexpr (element == Element::f16) {
            return _mm256_cvtph_ps(eight);
        } else {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
        }
    }
}

template <Element element>
QUANTLAB_AVX2_INLINE Weights load(const std::uint8_t* bytes) {
    Weights weights;
    for (int i = 0; i < 4; ++i) {
        weights.parts[i] = load_eight<element>(bytes + 8 * i * element_bytes(element));
    }
    return weights;
}

// bfloat16 of eight floats, to nearest with ties to even, NaN made quiet.
QUANTLAB_AVX2_INLINE __m128i brains_from_floats(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1));
}

template <Element element>
QUANTLAB_AVX2_INLINE void store(const Weights& weights, std::uint8_t* bytes) {
    for (int i = 0; i < 4; ++i) {
        if constexpr (element == Element::f32) {
            _mm256_storeu_ps(reinterpret_cast<float*>(bytes + 32 * i), weights.parts[i]);
        } else {
            const __m128i eight = element == Element::f16
                                      ? _mm256_cvtps_ph(weights.parts[i], _MM_FROUND_TO_NEAREST_INT)
                                      : brains_from_floats(weights.parts[i]);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 16 * i), eight);
        }
    }
}

// A finite number less itself is +0, whose bits are all 0; infinity and NaN give NaN.
QUANTLAB_AVX2_INLINE bool are_finite(const Weights& weights) {
    __m256 differences[4];
    for (int i = 0; i < 4; ++i) {
        differences[i] = _mm256_sub_ps(weights.parts[i], weights.parts[i]);
    }
    const __m256i any = _mm256_castps_si256(_mm256_or_ps(_mm256_or_ps(differences[0], differences[1]),
                                                         _mm256_or_ps(differences[2], differences[3])));
    return _mm256_testz_si256(any, any) != 0;
}

QUANTLAB_AVX2_INLINE __m256 magnitudes(__m256 values) {
    return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values);
}

// The largest of `low` in the lower four lanes, the largest of `high` in the upper four; zeros of either sign.
QUANTLAB_AVX2_INLINE __m256 two_largest(__m256 low, __m256 high) {
    __m256 both = _mm256_max_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    both = _mm256_max_ps(both, _mm256_permute_ps(both, _MM_SHUFFLE(1, 0, 3, 2)));
    return _mm256_max_ps(both, _mm256_permute_ps(both, _MM_SHUFFLE(2, 3, 0, 1)));
}

struct Extremes {
    float largest;
    float smallest;
};

QUANTLAB_AVX2_INLINE Extremes extremes(const Weights& weights) {
    const auto& [a, b, c, d] = weights.parts;
    const __m256 largest = _mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d));
    const __m256 smallest = _mm256_min_ps(_mm256_min_ps(a, b), _mm256_min_ps(c, d));
    const __m256 both = two_largest(largest, _mm256_xor_ps(smallest, _mm256_set1_ps(-0.0f)));
    return {_mm256_cvtss_f32(both), -_mm_cvtss_f32(_mm256_extractf128_ps(both, 1))};
}

QUANTLAB_AVX2_INLINE float with_sign(float value, bool is_negative) {
    const std::uint32_t magnitude = std::bit_cast<std::uint32_t>(value) & 0x7fffffffu;
    return std::bit_cast<float>(magnitude | static_cast<std::uint32_t>(is_negative) << 31);
}

// The first weight of that magnitude: among several it decides the sign.
QUANTLAB_AVX2_INLINE float first_of_magnitude(const Weights& weights, float magnitude) {
    std::uint32_t equal = 0;
    std::uint32_t negative = 0;
    for (int i = 0; i < 4; ++i) {
        const __m256 same = _mm256_cmp_ps(magnitudes(weights.parts[i]), _mm256_set1_ps(magnitude), _CMP_EQ_OQ);
        equal |= static_cast<std::uint32_t>(_mm256_movemask_ps(same)) << (8 * i);
        negative |= static_cast<std::uint32_t>(_mm256_movemask_ps(weights.parts[i])) << (8 * i);
    }
    const std::uint32_t first = equal & (~equal + 1u);
    return with_sign(magnitude, (negative & first) != 0);
}

// The 32 numbers as bytes, in order.
QUANTLAB_AVX2_INLINE __m256i bytes_of(const Codes& codes) {
    const __m256i low = _mm256_packs_epi32(codes.parts[0], codes.parts[1]);
    const __m256i high = _mm256_packs_epi32(codes.parts[2], codes.parts[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
}

// And back: signed bytes as 32 numbers.
QUANTLAB_AVX2_INLINE Codes widened(__m256i bytes) {
    const __m128i halves[2] = {_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)};
    Codes codes;
    for (int i = 0; i < 2; ++i) {
        codes.parts[2 * i] = _mm256_cvtepi8_epi32(halves[i]);
        codes.parts[2 * i + 1] = _mm256_cvtepi8_epi32(_mm_srli_si128(halves[i], 8));
    }
    return codes;
}

// Sums of squares in eight lanes of double precision: the lower four and the upper four of each vector of weights.
struct LaneSums {
    __m256d lanes[2];
};

QUANTLAB_AVX2_INLINE void add_squares(LaneSums& sums, __m256 values) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(values));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(values, 1));
    sums.lanes[0] = _mm256_add_pd(sums.lanes[0], _mm256_mul_pd(low, low));
    sums.lanes[1] = _mm256_add_pd(sums.lanes[1], _mm256_mul_pd(high, high));
}

QUANTLAB_AVX2_INLINE double total(const LaneSums& sums) {
    double lanes[sum_lanes];
    _mm256_storeu_pd(lanes, sums.lanes[0]);
    _mm256_storeu_pd(lanes + 4, sums.lanes[1]);
    return folded(lanes);
}

}  // namespace quantlab::avx2
