// The lanes in one vector of AVX-512 (F, BW, VL, VNNI): see lanes.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace quantlab::engine {

class Avx512Lanes {
public:
    using L = Avx512Lanes;
    static constexpr const char* name = "avx512";
    // Of 32 registers a token takes one for its integer and one for its float sums. A processor completes two
    // multiply-adds a cycle after four cycles; it reads memory faster in four places than in one.
    static constexpr int code_tile = 8;
    static constexpr int code_groups = 4;
    static constexpr int value_tile = 8;
    static constexpr int value_chains = 8;

    QUANTLAB_INLINE Avx512Lanes() = default;
    QUANTLAB_INLINE explicit Avx512Lanes(__m512 lanes) : lanes_(lanes) {}

    using Mask = __mmask16;

    static QUANTLAB_INLINE L load(const float* values) { return L(_mm512_loadu_ps(values)); }

    static QUANTLAB_INLINE L load_half(const std::uint16_t* values) {
        return L(_mm512_cvtph_ps(sixteen_shorts(values)));
    }

    static QUANTLAB_INLINE L load_brain(const std::uint16_t* values) {
        return L(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen_shorts(values)), 16)));
    }

    static QUANTLAB_INLINE L load_int8(const std::int8_t* values) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        return L(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
    }

    static QUANTLAB_INLINE L load_first(const float* values, int count) {
        return L(_mm512_maskz_loadu_ps(first(count), values));
    }

    static QUANTLAB_INLINE L broadcast(float value) { return L(_mm512_set1_ps(value)); }
    static QUANTLAB_INLINE L zero() { return L(_mm512_setzero_ps()); }

    QUANTLAB_INLINE void store(float* values) const { _mm512_storeu_ps(values, lanes_); }

    QUANTLAB_INLINE void store_half(std::uint16_t* values) const {
        const __m256i halves = _mm512_cvtps_ph(lanes_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), halves);
    }

    QUANTLAB_INLINE void store_int8(std::int8_t* values) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtsepi32_epi8(_mm512_cvttps_epi32(lanes_)));
    }

    QUANTLAB_INLINE void store_first(float* values, int count) const {
        _mm512_mask_storeu_ps(values, first(count), lanes_);
    }

    friend QUANTLAB_INLINE L operator+(L a, L b) { return L(_mm512_add_ps(a.lanes_, b.lanes_)); }
    friend QUANTLAB_INLINE L operator-(L a, L b) { return L(_mm512_sub_ps(a.lanes_, b.lanes_)); }
    friend QUANTLAB_INLINE L operator*(L a, L b) { return L(_mm512_mul_ps(a.lanes_, b.lanes_)); }
    friend QUANTLAB_INLINE L operator/(L a, L b) { return L(_mm512_div_ps(a.lanes_, b.lanes_)); }

    static QUANTLAB_INLINE L fma(L a, L b, L c) { return L(_mm512_fmadd_ps(a.lanes_, b.lanes_, c.lanes_)); }

    static QUANTLAB_INLINE L max(L a, L b) { return L(_mm512_max_ps(a.lanes_, b.lanes_)); }
    static QUANTLAB_INLINE L min(L a, L b) { return L(_mm512_min_ps(a.lanes_, b.lanes_)); }
    static QUANTLAB_INLINE L abs(L a) {
        const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
        return L(_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a.lanes_), magnitude)));
    }
    static QUANTLAB_INLINE L sqrt(L a) { return L(_mm512_sqrt_ps(a.lanes_)); }
    static QUANTLAB_INLINE L round(L a) {
        return L(_mm512_roundscale_ps(a.lanes_, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // A product, as in the other classes, not VSCALEFPS, which would take any n.
    static QUANTLAB_INLINE L scale_by_power_of_two(L a, L n) {
        const __m512i biased = _mm512_add_epi32(_mm512_cvttps_epi32(n.lanes_), _mm512_set1_epi32(127));
        return L(_mm512_mul_ps(a.lanes_, _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))));
    }

    static QUANTLAB_INLINE Mask greater(L a, L b) { return _mm512_cmp_ps_mask(a.lanes_, b.lanes_, _CMP_GT_OQ); }
    static QUANTLAB_INLINE Mask equal(L a, L b) { return _mm512_cmp_ps_mask(a.lanes_, b.lanes_, _CMP_EQ_OQ); }
    static QUANTLAB_INLINE L select(Mask mask, L a, L b) {
        return L(_mm512_mask_blend_ps(mask, b.lanes_, a.lanes_));
    }

    QUANTLAB_INLINE float fold_sum() const {
        const __m256 eight = _mm256_add_ps(low_half(), high_half());
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }

    QUANTLAB_INLINE float fold_max() const {
        const __m256 eight = _mm256_max_ps(low_half(), high_half());
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }

    // Multiplications by quantized weights.

    struct Codes {
        __m512i bytes;

        friend QUANTLAB_INLINE Codes operator|(Codes a, Codes b) { return {_mm512_or_si512(a.bytes, b.bytes)}; }
    };

    static QUANTLAB_INLINE Codes load_codes(const std::uint8_t* bytes) { return {_mm512_loadu_si512(bytes)}; }

    static QUANTLAB_INLINE Codes low_nibbles(Codes codes) { return masked(codes.bytes, 0x0f); }
    static QUANTLAB_INLINE Codes high_nibbles(Codes codes) {
        return masked(_mm512_srli_epi16(codes.bytes, 4), 0x0f);
    }
    static QUANTLAB_INLINE Codes fifth_bits(Codes codes, int bit) {
        return bit > 4 ? masked(_mm512_srli_epi16(codes.bytes, static_cast<unsigned>(bit - 4)), 0x10)
                       : masked(_mm512_slli_epi16(codes.bytes, static_cast<unsigned>(4 - bit)), 0x10);
    }

    static QUANTLAB_INLINE Codes two_bits(Codes codes, int bit) {
        return masked(_mm512_srli_epi16(codes.bytes, static_cast<unsigned>(bit)), 0x03);
    }

    static QUANTLAB_INLINE L column(Codes codes, int i) {
        const __m512i byte = _mm512_set1_epi32(0xff);
        const __m512i shifted = _mm512_srli_epi32(codes.bytes, static_cast<unsigned>(8 * i));
        return L(_mm512_cvtepi32_ps(_mm512_and_si512(shifted, byte)));
    }

    template <int bits>
    static constexpr int planes = 1;

    template <int bits>
    class Dot {
    public:
        QUANTLAB_INLINE void add(Codes codes, int, const std::int8_t* four) {
            std::int32_t packed;
            std::memcpy(&packed, four, sizeof packed);
            sums_ = _mm512_dpbusd_epi32(sums_, codes.bytes, _mm512_set1_epi32(packed));
        }

        QUANTLAB_INLINE L total() const { return L(_mm512_cvtepi32_ps(sums_)); }

    private:
        __m512i sums_ = _mm512_setzero_si512();
    };

private:
    static QUANTLAB_INLINE __m256i sixteen_shorts(const std::uint16_t* values) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    }

    static QUANTLAB_INLINE Mask first(int count) { return static_cast<Mask>((1u << count) - 1u); }

    static QUANTLAB_INLINE Codes masked(__m512i bytes, char mask) {
        return {_mm512_and_si512(bytes, _mm512_set1_epi8(mask))};
    }

    QUANTLAB_INLINE __m256 low_half() const { return _mm512_castps512_ps256(lanes_); }
    // AVX-512F extracts 256 bits as doubles only.
    QUANTLAB_INLINE __m256 high_half() const {
        return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes_), 1));
    }

    __m512 lanes_;
};

}  // namespace quantlab::engine
