// Rows to and from blocks with AVX2 and F16C, eight weights a vector: the portable variant's bytes and sums.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "avx2_vectors.h"
#include "instruction_set.h"

#include <cstring>

namespace quantlab {

namespace {

using namespace avx2;

// What a block's codes are made with: code = clamp((weight - minimum) * inverse + offset). `header` holds the scale's
// half-precision bits in its lower 16 bits and the minimum's above.
struct Scaling {
    std::uint32_t header;
    float minimum;
    float inverse;
    float offset;
};

QUANTLAB_AVX2_INLINE std::uint32_t header_of(float scale, float minimum) {
    const __m128 values = _mm_unpacklo_ps(_mm_set_ss(scale), _mm_set_ss(minimum));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT)));
}

QUANTLAB_AVX2_INLINE Scaling affine_scaling(const Weights& weights, std::int32_t levels) {
    Extremes found = extremes(weights);
    if (found.smallest == 0.0f) [[unlikely]] {  // of zeros of both signs the first counts
        found.smallest = first_of_magnitude(weights, 0.0f);
        found.largest = found.largest == 0.0f ? found.smallest : found.largest;
    }
    const float scale = (found.largest - found.smallest) / last_code(levels);
    return {header_of(scale, found.smallest), found.smallest, inverse_or_zero(scale), 0.5f};
}

// The sign is set without a branch, which no processor could predict.
QUANTLAB_AVX2_INLINE float extreme_weight(const Weights& weights) {
    const Extremes found = extremes(weights);
    const float above = found.largest;
    const float below = -found.smallest;
    if (above == below) [[unlikely]] {
        return first_of_magnitude(weights, above);
    }
    return with_sign(above < below ? below : above, above < below);
}

QUANTLAB_AVX2_INLINE Scaling symmetric_scaling(const Weights& weights, std::int32_t levels) {
    const auto half = static_cast<float>(levels / 2);
    const float scale = extreme_weight(weights) / -half;
    return {header_of(scale, 0.0f), 0.0f, inverse_or_zero(scale), is_vanishing(scale) ? 0.0f : half + 0.5f};
}

QUANTLAB_AVX2_INLINE float largest_magnitude(const Weights& weights) {
    const auto& [a, b, c, d] = weights.parts;
    const __m256 largest = _mm256_max_ps(_mm256_max_ps(magnitudes(a), magnitudes(b)),
                                         _mm256_max_ps(magnitudes(c), magnitudes(d)));
    return _mm256_cvtss_f32(two_largest(largest, largest));
}

QUANTLAB_AVX2_INLINE Scaling signed_scaling(const Weights& weights, std::int32_t levels) {
    const float scale = largest_magnitude(weights) / largest_signed_code(levels);
    return {header_of(scale, 0.0f), 0.0f, inverse_or_zero(scale), 0.0f};
}

// A block with a weight that is not finite has scale NaN, and all its codes will be 0.
template <typename Block>
QUANTLAB_AVX2_INLINE Scaling scaling_of(const Weights& weights, std::int32_t levels) {
    if (!are_finite(weights)) [[unlikely]] {
        return {half_nan_bits, 0.0f, 0.0f, 0.0f};
    }
    if constexpr (Affine<Block>) {
        return affine_scaling(weights, levels);
    } else if constexpr (Symmetric<Block>) {
        return symmetric_scaling(weights, levels);
    } else {
        return signed_scaling(weights, levels);
    }
}

QUANTLAB_AVX2_INLINE __m256i truncated_codes(__m256 positions, __m256 top) {
    return _mm256_cvttps_epi32(_mm256_min_ps(_mm256_max_ps(positions, _mm256_setzero_ps()), top));
}

// Half away from zero.
QUANTLAB_AVX2_INLINE __m256i rounded_codes(__m256 positions, __m256 top) {
    const __m256 sizes = _mm256_min_ps(_mm256_max_ps(magnitudes(positions), _mm256_setzero_ps()), top);
    const __m256 whole = _mm256_round_ps(sizes, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const __m256 rest = _mm256_sub_ps(sizes, whole);
    const __m256i carry = _mm256_cvttps_epi32(_mm256_add_ps(rest, rest));
    const __m256i rounded = _mm256_add_epi32(_mm256_cvttps_epi32(whole), carry);
    // The sign bit and a 1 below it: an integer of the position's sign, never 0.
    const __m256i sign = _mm256_or_si256(_mm256_castps_si256(positions), _mm256_set1_epi32(1));
    return _mm256_sign_epi32(rounded, sign);
}

// The codes less the code of zero: what the scale is multiplied by when they are decoded.
template <typename Block>
QUANTLAB_AVX2_INLINE Codes steps_of(const Weights& weights, const Scaling& scaling, std::int32_t levels) {
    const __m256 inverse = _mm256_set1_ps(scaling.inverse);
    const __m256 offset = _mm256_set1_ps(scaling.offset);
    const __m256 top = _mm256_set1_ps(last_code(levels));
    Codes steps;
    for (int i = 0; i < 4; ++i) {
        const __m256 weight = weights.parts[i];
        if constexpr (Affine<Block>) {
            const __m256 above = _mm256_sub_ps(weight, _mm256_set1_ps(scaling.minimum));
            steps.parts[i] = truncated_codes(_mm256_add_ps(_mm256_mul_ps(above, inverse), offset), top);
        } else if constexpr (Symmetric<Block>) {
            const __m256i codes = truncated_codes(_mm256_add_ps(_mm256_mul_ps(weight, inverse), offset), top);
            steps.parts[i] = _mm256_sub_epi32(codes, _mm256_set1_epi32(levels / 2));
        } else {
            steps.parts[i] = rounded_codes(_mm256_mul_ps(weight, inverse), _mm256_set1_ps(largest_signed_code(levels)));
        }
    }
    return steps;
}

QUANTLAB_AVX2_INLINE bool is_finite_header(std::uint32_t header) {
    const std::uint32_t low = half_infinity_bits;
    return (header & low) != low && (header & (low << 16)) != (low << 16);
}

template <typename Block>
QUANTLAB_AVX2_INLINE void write(const Codes& steps, std::uint32_t header, std::uint8_t* bytes) {
    std::memcpy(bytes, &header, Affine<Block> ? 4 : 2);
    std::uint8_t* body = bytes + (Affine<Block> ? 4 : 2);
    __m256i codes = bytes_of(steps);
    if constexpr (Symmetric<Block>) {
        codes = _mm256_add_epi8(codes, _mm256_set1_epi8(Block::zero_code));
    } else if constexpr (!Affine<Block>) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(body), codes);
        return;
    }
    if constexpr (HasHighBits<Block>) {
        const int high_bits = _mm256_movemask_epi8(_mm256_slli_epi16(codes, 3));  // bit 4 of each byte to its top
        std::memcpy(body, &high_bits, 4);
        body += 4;
    }
    const __m256i nibbles = _mm256_and_si256(codes, _mm256_set1_epi8(0x0f));
    const __m128i upper = _mm_slli_epi16(_mm256_extracti128_si256(nibbles, 1), 4);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(body), _mm_or_si128(_mm256_castsi256_si128(nibbles), upper));
}

// The codes of a block of bytes, less the code of zero.
template <typename Block>
QUANTLAB_AVX2_INLINE Codes read_steps(const std::uint8_t* bytes) {
    Codes steps;
    if constexpr (sizeof(Block) == sizeof(BlockQ8_0)) {
        for (int i = 0; i < 4; ++i) {
            const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 2 + 8 * i));
            steps.parts[i] = _mm256_cvtepi8_epi32(eight);
        }
        return steps;
    } else {
        const std::uint8_t* body = bytes + sizeof(Block) - 16;
        const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(body));
        const __m128i mask = _mm_set1_epi8(0x0f);
        __m128i halves[2] = {_mm_and_si128(packed, mask), _mm_and_si128(_mm_srli_epi16(packed, 4), mask)};
        if constexpr (HasHighBits<Block>) {
            std::uint16_t high_bits[2];
            std::memcpy(high_bits, body - 4, 4);
            const __m128i own_bit = _mm_set1_epi64x(static_cast<long long>(0x8040201008040201));
            const __m128i own_byte = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            for (int i = 0; i < 2; ++i) {
                const __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(high_bits[i]), own_byte);
                const __m128i is_set = _mm_cmpeq_epi8(_mm_and_si128(spread, own_bit), own_bit);
                halves[i] = _mm_or_si128(halves[i], _mm_and_si128(is_set, _mm_set1_epi8(0x10)));
            }
        }
        if constexpr (Symmetric<Block>) {
            halves[0] = _mm_sub_epi8(halves[0], _mm_set1_epi8(Block::zero_code));
            halves[1] = _mm_sub_epi8(halves[1], _mm_set1_epi8(Block::zero_code));
        }
        for (int i = 0; i < 2; ++i) {
            steps.parts[2 * i] = _mm256_cvtepi8_epi32(halves[i]);
            steps.parts[2 * i + 1] = _mm256_cvtepi8_epi32(_mm_srli_si128(halves[i], 8));
        }
        return steps;
    }
}

template <typename Block>
QUANTLAB_AVX2_INLINE Weights decoded(const Codes& steps, std::uint32_t header) {
    const __m128 halves = _mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int>(header)));
    const __m256 scale = _mm256_broadcastss_ps(halves);
    const __m256 minimum = _mm256_broadcastss_ps(_mm_movehdup_ps(halves));
    Weights weights;
    for (int i = 0; i < 4; ++i) {
        weights.parts[i] = _mm256_mul_ps(scale, _mm256_cvtepi32_ps(steps.parts[i]));
        if constexpr (Affine<Block>) {
            weights.parts[i] = _mm256_add_ps(weights.parts[i], minimum);
        }
    }
    return weights;
}

QUANTLAB_AVX2_INLINE void write_not_a_number(std::int64_t block_bytes, std::uint8_t* bytes) {
    std::memset(bytes, 0, static_cast<std::size_t>(block_bytes));
    std::memcpy(bytes, &half_nan_bits, sizeof half_nan_bits);
}

// Each block's scaling is found while the codes of the one before it are made: it is a chain of two divisions that
// everything else in its block waits for.
template <typename Block, Element element, bool is_measured>
QUANTLAB_AVX2 bool quantize_row(const std::uint8_t* source, std::int64_t blocks, std::int32_t levels,
                                std::uint8_t* bytes, RowSums* sums) {
    constexpr std::int64_t source_bytes = weights_per_block * element_bytes(element);
    const __m256d zero = _mm256_setzero_pd();
    LaneSums squared_errors{{zero, zero}};
    LaneSums squared_weights{{zero, zero}};
    bool is_sound = true;
    Scaling next{};
    if (blocks > 0) {
        next = scaling_of<Block>(load<element>(source), levels);
    }
    for (std::int64_t i = 0; i < blocks; ++i) {
        const Scaling scaling = next;
        const std::uint8_t* following = i + 1 < blocks ? source + source_bytes : source;
        next = scaling_of<Block>(load<element>(following), levels);
        const Weights weights = load<element>(source);
        const Codes steps = steps_of<Block>(weights, scaling, levels);
        is_sound = is_sound && is_finite_header(scaling.header);
        if (scaling.header == half_nan_bits) [[unlikely]] {
            write_not_a_number(sizeof(Block), bytes);
        } else {
            write<Block>(steps, scaling.header, bytes);
        }
        if constexpr (is_measured) {
            const Weights rounded = decoded<Block>(steps, scaling.header);
            for (int part = 0; part < 4; ++part) {
                add_squares(squared_errors, _mm256_sub_ps(rounded.parts[part], weights.parts[part]));
                add_squares(squared_weights, weights.parts[part]);
            }
        }
        source = following;
        bytes += sizeof(Block);
    }
    if constexpr (is_measured) {
        *sums = {total(squared_errors), total(squared_weights)};
    }
    return is_sound;
}

// Eight sums in double precision: the lower four lanes and the upper four.
struct Lanes {
    __m256d low;
    __m256d high;
};

// Of the vectors of a block from `first` on, `stride` apart: the last of the halvings adds neighbours, the first those
// farthest from each other.
template <Element element, int first, int stride>
QUANTLAB_AVX2_INLINE Lanes halved_magnitudes(const std::uint8_t* source) {
    if constexpr (first + stride >= weights_in<BlockTQ2_0> / 8) {
        const __m256 eight = magnitudes(load_eight<element>(source + 8 * first * element_bytes(element)));
        return {_mm256_cvtps_pd(_mm256_castps256_ps128(eight)), _mm256_cvtps_pd(_mm256_extractf128_ps(eight, 1))};
    } else {
        const Lanes lower = halved_magnitudes<element, first, 2 * stride>(source);
        const Lanes upper = halved_magnitudes<element, first + stride, 2 * stride>(source);
        return {_mm256_add_pd(lower.low, upper.low), _mm256_add_pd(lower.high, upper.high)};
    }
}

template <Element element>
QUANTLAB_AVX2 void sum_magnitudes_row(const std::uint8_t* source, std::int64_t blocks, double* sums) {
    for (std::int64_t i = 0; i < blocks; ++i) {
        const Lanes eight = halved_magnitudes<element, 0, 1>(source);
        const __m256d four = _mm256_add_pd(eight.low, eight.high);
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        sums[i] = _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
        source += weights_in<BlockTQ2_0> * element_bytes(element);
    }
}

// The steps of 32 weights, -1, 0 and 1: a comparison that holds is -1.
QUANTLAB_AVX2_INLINE Codes ternary_steps(const Weights& weights, __m256 threshold) {
    const __m256 below = _mm256_xor_ps(threshold, _mm256_set1_ps(-0.0f));
    Codes steps;
    for (int i = 0; i < 4; ++i) {
        const __m256i is_above = _mm256_castps_si256(_mm256_cmp_ps(weights.parts[i], threshold, _CMP_GT_OQ));
        const __m256i is_below = _mm256_castps_si256(_mm256_cmp_ps(weights.parts[i], below, _CMP_LT_OQ));
        steps.parts[i] = _mm256_sub_epi32(is_below, is_above);
    }
    return steps;
}

template <Element element, bool is_measured>
QUANTLAB_AVX2 void quantize_ternary_row(const std::uint8_t* source, std::int64_t blocks, std::uint16_t scale,
                                        std::uint8_t* bytes, RowSums* sums) {
    constexpr std::int64_t group_bytes = 32 * element_bytes(element);
    const __m256 threshold = _mm256_set1_ps(ternary_threshold(scale));
    const __m256i zeros = _mm256_set1_epi8(static_cast<char>(ternary_zeros));
    const __m256d zero = _mm256_setzero_pd();
    LaneSums squared_errors{{zero, zero}};
    LaneSums squared_weights{{zero, zero}};
    for (std::int64_t i = 0; i < blocks; ++i) {
        __m256i differences = _mm256_setzero_si256();
        for (int half = 0; half < 2; ++half) {
            __m256i packed = _mm256_setzero_si256();
            for (int group = 0; group < 4; ++group) {
                const Weights weights = load<element>(source);
                const Codes steps = ternary_steps(weights, threshold);
                const __m256i codes = _mm256_add_epi8(bytes_of(steps), _mm256_set1_epi8(ternary_zero));
                packed = _mm256_or_si256(packed, _mm256_slli_epi16(codes, 2 * group));  // at most 2: stays in its byte
                if constexpr (is_measured) {
                    const Weights rounded = decoded<BlockTQ2_0>(steps, scale);
                    for (int part = 0; part < 4; ++part) {
                        add_squares(squared_errors, _mm256_sub_ps(rounded.parts[part], weights.parts[part]));
                        add_squares(squared_weights, weights.parts[part]);
                    }
                }
                source += group_bytes;
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(bytes + 32 * half), packed);
            differences = _mm256_or_si256(differences, _mm256_xor_si256(packed, zeros));
        }
        const std::uint16_t stored = _mm256_testz_si256(differences, differences) != 0 ? std::uint16_t{0} : scale;
        std::memcpy(bytes + 64, &stored, sizeof stored);
        bytes += sizeof(BlockTQ2_0);
    }
    if constexpr (is_measured) {
        *sums = {total(squared_errors), total(squared_weights)};
    }
}

template <Element element>
QUANTLAB_AVX2 void dequantize_ternary_row(const std::uint8_t* bytes, std::int64_t blocks, std::uint8_t* weights) {
    for (std::int64_t i = 0; i < blocks; ++i) {
        std::uint16_t scale;
        std::memcpy(&scale, bytes + 64, sizeof scale);
        for (int half = 0; half < 2; ++half) {
            __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * half));
            for (int group = 0; group < 4; ++group) {
                const __m256i codes = _mm256_and_si256(packed, _mm256_set1_epi8(3));
                const Codes steps = widened(_mm256_sub_epi8(codes, _mm256_set1_epi8(ternary_zero)));
                store<element>(decoded<BlockTQ2_0>(steps, scale), weights);
                weights += 32 * element_bytes(element);
                packed = _mm256_srli_epi16(packed, 2);
            }
        }
        bytes += sizeof(BlockTQ2_0);
    }
}

struct Avx2Rows {
    template <typename Block, Element element>
    static bool quantize(const std::uint8_t* weights, std::int64_t blocks, std::int32_t levels, std::uint8_t* bytes,
                         RowSums* sums) {
        return sums == nullptr ? quantize_row<Block, element, false>(weights, blocks, levels, bytes, nullptr)
                               : quantize_row<Block, element, true>(weights, blocks, levels, bytes, sums);
    }

    template <typename Block, Element element>
    QUANTLAB_AVX2 static void dequantize(const std::uint8_t* bytes, std::int64_t blocks, std::uint8_t* weights) {
        if constexpr (sizeof(Block) == sizeof(BlockTQ2_0)) {
            dequantize_ternary_row<element>(bytes, blocks, weights);
        } else {
            for (std::int64_t i = 0; i < blocks; ++i) {
                std::uint32_t header = 0;
                std::memcpy(&header, bytes, Affine<Block> ? 4 : 2);
                store<element>(decoded<Block>(read_steps<Block>(bytes), header), weights);
                weights += weights_per_block * element_bytes(element);
                bytes += sizeof(Block);
            }
        }
    }

    template <Element element>
    static void sum_magnitudes(const std::uint8_t* weights, std::int64_t blocks, double* sums) {
        sum_magnitudes_row<element>(weights, blocks, sums);
    }

    template <Element element>
    static void quantize_ternary(const std::uint8_t* weights, std::int64_t blocks, std::uint16_t scale,
                                 std::uint8_t* bytes, RowSums* sums) {
        if (sums == nullptr) {
            quantize_ternary_row<element, false>(weights, blocks, scale, bytes, nullptr);
        } else {
            quantize_ternary_row<element, true>(weights, blocks, scale, bytes, sums);
        }
    }
};

constexpr Kernel kernel = KernelTable<Avx2Rows>::named("avx2");

}  // namespace

const Kernel* avx2_kernel() { return can_run(InstructionSet::avx2) ? &kernel : nullptr; }

}  // namespace quantlab

#else

namespace quantlab {

const Kernel* avx2_kernel() { return nullptr; }

}  // namespace quantlab

#endif
