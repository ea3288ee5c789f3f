// The lanes in two vectors of AVX2, with FMA and F16C, and with AVX-VNNI's byte products if asked: see lanes.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quantlab::engine {

template <bool has_vnni>
class AvxLanes {
public:
    using L = AvxLanes;
    static constexpr const char* name = "avx2";
    // Of 16 registers a token takes two for its sums, the weights two, the activations one. A processor completes two
    // multiply-adds a cycle after four cycles; it reads memory faster in four places than in one.
    static constexpr int code_tile = 4;
    static constexpr int code_groups = 4;
    static constexpr int value_tile = 6;
    static constexpr int value_chains = 4;

    QUANTLAB_INLINE AvxLanes() = default;
    QUANTLAB_INLINE AvxLanes(__m256 low, __m256 high) : low_(low), high_(high) {}

    struct Mask {
        __m256 low;
        __m256 high;
    };

    static QUANTLAB_INLINE L load(const float* values) {
        return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
    }

    static QUANTLAB_INLINE L load_half(const std::uint16_t* values) {
        return {_mm256_cvtph_ps(eight_shorts(values)), _mm256_cvtph_ps(eight_shorts(values + 8))};
    }

    static QUANTLAB_INLINE L load_brain(const std::uint16_t* values) {
        return {widened(eight_shorts(values)), widened(eight_shorts(values + 8))};
    }

    static QUANTLAB_INLINE L load_int8(const std::int8_t* values) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    }

    static QUANTLAB_INLINE L load_first(const float* values, int count) {
        return {_mm256_maskload_ps(values, first(count)), _mm256_maskload_ps(values + 8, first(count - 8))};
    }

    static QUANTLAB_INLINE L broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static QUANTLAB_INLINE L zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

    QUANTLAB_INLINE void store(float* values) const {
        _mm256_storeu_ps(values, low_);
        _mm256_storeu_ps(values + 8, high_);
    }

    QUANTLAB_INLINE void store_half(std::uint16_t* values) const {
        auto* halves = reinterpret_cast<__m128i*>(values);
        _mm_storeu_si128(halves, _mm256_cvtps_ph(low_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
        _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(high_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    QUANTLAB_INLINE void store_int8(std::int8_t* values) const {
        const __m256i shorts = _mm256_packs_epi32(_mm256_cvttps_epi32(low_), _mm256_cvttps_epi32(high_));
        const __m256i ordered = _mm256_permute4x64_epi64(shorts, _MM_SHUFFLE(3, 1, 2, 0));
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), bytes);
    }

    QUANTLAB_INLINE void store_first(float* values, int count) const {
        _mm256_maskstore_ps(values, first(count), low_);
        _mm256_maskstore_ps(values + 8, first(count - 8), high_);
    }

    friend QUANTLAB_INLINE L operator+(L a, L b) {
        return {_mm256_add_ps(a.low_, b.low_), _mm256_add_ps(a.high_, b.high_)};
    }
    friend QUANTLAB_INLINE L operator-(L a, L b) {
        return {_mm256_sub_ps(a.low_, b.low_), _mm256_sub_ps(a.high_, b.high_)};
    }
    friend QUANTLAB_INLINE L operator*(L a, L b) {
        return {_mm256_mul_ps(a.low_, b.low_), _mm256_mul_ps(a.high_, b.high_)};
    }
    friend QUANTLAB_INLINE L operator/(L a, L b) {
        return {_mm256_div_ps(a.low_, b.low_), _mm256_div_ps(a.high_, b.high_)};
    }

    static QUANTLAB_INLINE L fma(L a, L b, L c) {
        return {_mm256_fmadd_ps(a.low_, b.low_, c.low_), _mm256_fmadd_ps(a.high_, b.high_, c.high_)};
    }

    static QUANTLAB_INLINE L max(L a, L b) {
        return {_mm256_max_ps(a.low_, b.low_), _mm256_max_ps(a.high_, b.high_)};
    }
    static QUANTLAB_INLINE L min(L a, L b) {
        return {_mm256_min_ps(a.low_, b.low_), _mm256_min_ps(a.high_, b.high_)};
    }
    static QUANTLAB_INLINE L abs(L a) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, a.low_), _mm256_andnot_ps(sign, a.high_)};
    }
    static QUANTLAB_INLINE L sqrt(L a) { return {_mm256_sqrt_ps(a.low_), _mm256_sqrt_ps(a.high_)}; }
    static QUANTLAB_INLINE L round(L a) {
        return {_mm256_round_ps(a.low_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                _mm256_round_ps(a.high_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }

    static QUANTLAB_INLINE L scale_by_power_of_two(L a, L n) {
        return {_mm256_mul_ps(a.low_, power_of_two(n.low_)), _mm256_mul_ps(a.high_, power_of_two(n.high_))};
    }

    static QUANTLAB_INLINE Mask greater(L a, L b) {
        return {_mm256_cmp_ps(a.low_, b.low_, _CMP_GT_OQ), _mm256_cmp_ps(a.high_, b.high_, _CMP_GT_OQ)};
    }
    static QUANTLAB_INLINE Mask equal(L a, L b) {
        return {_mm256_cmp_ps(a.low_, b.low_, _CMP_EQ_OQ), _mm256_cmp_ps(a.high_, b.high_, _CMP_EQ_OQ)};
    }
    static QUANTLAB_INLINE L select(Mask mask, L a, L b) {
        return {_mm256_blendv_ps(b.low_, a.low_, mask.low), _mm256_blendv_ps(b.high_, a.high_, mask.high)};
    }

    QUANTLAB_INLINE float fold_sum() const {
        const __m256 eight = _mm256_add_ps(low_, high_);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    QUANTLAB_INLINE float fold_max() const {
        const __m256 eight = _mm256_max_ps(low_, high_);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

    // Multiplications by quantized weights.

    struct Codes {
        __m256i low;
        __m256i high;

        friend QUANTLAB_INLINE Codes operator|(Codes a, Codes b) {
            return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
        }
    };

    static QUANTLAB_INLINE Codes load_codes(const std::uint8_t* bytes) {
        const auto* vectors = reinterpret_cast<const __m256i*>(bytes);
        return {_mm256_loadu_si256(vectors), _mm256_loadu_si256(vectors + 1)};
    }

    static QUANTLAB_INLINE Codes low_nibbles(Codes codes) { return masked(codes, 0x0f); }
    static QUANTLAB_INLINE Codes high_nibbles(Codes codes) {
        return masked({_mm256_srli_epi16(codes.low, 4), _mm256_srli_epi16(codes.high, 4)}, 0x0f);
    }
    static QUANTLAB_INLINE Codes fifth_bits(Codes codes, int bit) {
        if (bit > 4) {
            return masked({_mm256_srli_epi16(codes.low, bit - 4), _mm256_srli_epi16(codes.high, bit - 4)}, 0x10);
        }
        return masked({_mm256_slli_epi16(codes.low, 4 - bit), _mm256_slli_epi16(codes.high, 4 - bit)}, 0x10);
    }

    static QUANTLAB_INLINE Codes two_bits(Codes codes, int bit) {
        return masked({_mm256_srli_epi16(codes.low, bit), _mm256_srli_epi16(codes.high, bit)}, 0x03);
    }

    static QUANTLAB_INLINE L column(Codes codes, int i) {
        const __m256i byte = _mm256_set1_epi32(0xff);
        return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes.low, 8 * i), byte)),
                _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(codes.high, 8 * i), byte))};
    }

    template <int bits>
    static constexpr int planes = has_vnni || bits <= 5 ? 1 : 2;

    // Pairs of products are added in 16 bits, where a pair is at most 2 * 127 * (2^bits - 1) in size: all eight of
    // them fit with 4 bits, four with 5, and 32 with 2, though no weight is to have the code 3.
    template <int bits>
    class Dot {
    public:
        static_assert(bits == 2 || bits == 4 || bits == 5 || bits == 8);

        QUANTLAB_INLINE void add(Codes codes, [[maybe_unused]] int i, const std::int8_t* four) {
            std::int32_t packed;
            std::memcpy(&packed, four, sizeof packed);
            const __m256i activations = _mm256_set1_epi32(packed);
            if constexpr (has_vnni) {
                add_products(codes, activations);
            } else {
                if (bits > 4 && i == full) {
                    wide_ = widened(1);
                    pairs_ = Codes{};
                }
                pairs_.low = _mm256_add_epi16(pairs_.low, _mm256_maddubs_epi16(codes.low, activations));
                pairs_.high = _mm256_add_epi16(pairs_.high, _mm256_maddubs_epi16(codes.high, activations));
                keep_order();
            }
        }

        QUANTLAB_INLINE L total() const {
            Codes sums = wide_;
            if constexpr (!has_vnni) {
                const Codes rest = widened(bits == 8 ? 16 : 1);
                sums = {_mm256_add_epi32(sums.low, rest.low), _mm256_add_epi32(sums.high, rest.high)};
            }
            return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)};
        }

    private:
        static constexpr int full = bits == 5 ? 4 : 8;  // additions to pairs_

        QUANTLAB_INLINE void add_products([[maybe_unused]] Codes codes, [[maybe_unused]] __m256i activations) {
#if defined(__AVXVNNI__)
            wide_.low = _mm256_dpbusd_avx_epi32(wide_.low, codes.low, activations);
            wide_.high = _mm256_dpbusd_avx_epi32(wide_.high, codes.high, activations);
#endif
        }

        QUANTLAB_INLINE Codes widened(short factor) const {
            const __m256i factors = _mm256_set1_epi16(factor);
            return {_mm256_madd_epi16(pairs_.low, factors), _mm256_madd_epi16(pairs_.high, factors)};
        }

        // Keeps the compiler from adding in another order, with more products at hand than there are registers.
        QUANTLAB_INLINE void keep_order() {
#if defined(__GNUC__)
            __asm__("" : "+x"(pairs_.low), "+x"(pairs_.high));
#endif
        }

        Codes pairs_ = {};
        Codes wide_ = {};
    };

private:
    static QUANTLAB_INLINE __m128i eight_shorts(const std::uint16_t* values) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    }

    // True in the first lanes of eight; masked loads and stores touch no memory for the others.
    static QUANTLAB_INLINE __m256i first(int count) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }

    static QUANTLAB_INLINE __m256 widened(__m128i brains) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(brains), 16));
    }

    static QUANTLAB_INLINE __m256 power_of_two(__m256 exponent) {
        const __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(exponent), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    }

    static QUANTLAB_INLINE Codes masked(Codes codes, char mask) {
        const __m256i bits = _mm256_set1_epi8(mask);
        return {_mm256_and_si256(codes.low, bits), _mm256_and_si256(codes.high, bits)};
    }

    __m256 low_;
    __m256 high_;
};

#if defined(__AVXVNNI__)
using AvxVnniLanes = AvxLanes<true>;
#else
using Avx2Lanes = AvxLanes<false>;
#endif

}  // namespace quantlab::engine
