// Activations of a token in int8: the formulas are at quantize_token and quantize_row in packed_matrix.h.
#pragma once

#include "lanes.h"
#include "packed_matrix.h"

#include <cstdint>
#include <limits>

namespace quantlab::engine {

// Zero for scales whose inverse is beyond fp32.
QUANTLAB_INLINE float inverse_of_scale(float scale) {
    const float inverse = 1.0f / scale;
    return inverse <= std::numeric_limits<float>::max() ? inverse : 0.0f;
}

template <typename L>
struct QuantizeToken {
    static void run(const float* values, int columns, std::int8_t* codes, float* scales, float* sums) {
        for (int b = 0; b < columns / block_columns; ++b) {
            quantize_block(values + b * block_columns, codes + b * block_columns, scales[b], sums[b]);
        }
    }

private:
    static QUANTLAB_INLINE void quantize_block(const float* values, std::int8_t* codes, float& scale, float& sum) {
        const L low = L::load(values);
        const L high = L::load(values + 16);
        scale = L::max(L::abs(low), L::abs(high)).fold_max() / 127.0f;
        // A finite number less itself is zero; infinity and NaN give NaN.
        const bool is_finite = ((low - low) + (high - high)).fold_sum() == 0.0f;
        const float inverse = is_finite ? inverse_of_scale(scale) : 0.0f;
        const L low_codes = is_finite ? L::round(low * L::broadcast(inverse)) : L::zero();
        const L high_codes = is_finite ? L::round(high * L::broadcast(inverse)) : L::zero();
        low_codes.store_int8(codes);
        high_codes.store_int8(codes + 16);
        scale = is_finite ? scale : std::numeric_limits<float>::quiet_NaN();
        sum = scale * (low_codes + high_codes).fold_sum();
    }
};

template <typename L>
struct QuantizeRow {
    static void run(const float* values, int columns, std::int8_t* codes, float* scale, float* sums) {
        L largest = L::zero(), doubt = L::zero();
        for (int i = 0; i < columns; i += lane_count) {
            const L some = L::load(values + i);
            largest = L::max(L::abs(some), largest);
            doubt = doubt + (some - some);
        }
        const bool is_finite = doubt.fold_sum() == 0.0f;
        *scale = is_finite ? largest.fold_max() / 127.0f : std::numeric_limits<float>::quiet_NaN();
        const L inverse = L::broadcast(is_finite ? inverse_of_scale(*scale) : 0.0f);
        for (int start = 0; start < columns; start += ternary_columns) {
            L sum = L::zero();
            for (int i = start; i < start + ternary_columns; i += lane_count) {
                const L some = is_finite ? L::round(L::load(values + i) * inverse) : L::zero();
                some.store_int8(codes + i);
                sum = sum + some;
            }
            *sums++ = sum.fold_sum();
        }
    }
};

}  // namespace quantlab::engine
