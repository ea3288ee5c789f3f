// The best scales of a block for given column weights, sixteen rows at a time: every pair of clipped ends of a grid is
// rounded and solved for (step, offset) by weighted least squares; the best is iterated, rounded to half precision and
// compared with its neighbours there.
#pragma once

#include "products.h"

#include <cstdint>

namespace quantlab::quantizers {

template <typename L>
struct Scales {
    L step;
    L offset;
};

// Grid points for each end of a block's range, and rounds of least squares after it.
struct SearchEffort {
    int clips;
    int rounds;
};

template <typename L>
QUANTLAB_INLINE L to_half(L value) {
    std::uint16_t halves[lanes];
    value.store_half(halves);
    return L::load_half(halves);
}

template <typename L>
QUANTLAB_INLINE L inverse_or_zero(L step) {
    const L zero = L::zero();
    return L::select(L::equal(step, zero), zero, L::broadcast(1.0f) / step);
}

template <typename L>
QUANTLAB_INLINE L nearest_code(L value, L offset, L inverse, const CodeRange& range) {
    const L code = L::round((value - offset) * inverse);
    return L::min(L::max(code, L::broadcast(range.least)), L::broadcast(range.most));
}

// Values [32][16] and their weights [32][16] of one block of sixteen rows.
template <typename L>
class ScaleSearch {
public:
    ScaleSearch(const float* values, const float* weights, const CodeRange& range, const SearchEffort& effort)
        : values_(values), weights_(weights), range_(range), effort_(effort),
          middle_(L::broadcast(range.has_offset ? 0.5f * (range.least + range.most) : 0.0f)) {}

    // Steps and offsets in half precision. Lanes whose values are all alike get step zero.
    QUANTLAB_INLINE Scales<L> run() {
        centre();
        best_ = {L::zero(), range_.has_offset ? mean_ : L::zero()};
        best_gain_ = L::zero();
        if (range_.has_offset) {
            scan_ends();
        } else {
            scan_steps();
        }
        for (int round = 0; round < effort_.rounds; ++round) {
            improve(best_);
        }
        return best_halves();
    }

    // The weighted squared error with the nearest codes for these scales.
    QUANTLAB_INLINE L error(const Scales<L>& scales) const {
        const L inverse = inverse_or_zero(scales.step);
        L sum = L::zero();
        for (int j = 0; j < block_columns; ++j) {
            const L value = L::load(values_ + j * lanes);
            const L code = nearest_code(value, scales.offset, inverse, range_);
            const L difference = value - (scales.step * code + scales.offset);
            sum = L::fma(L::load(weights_ + j * lanes) * difference, difference, sum);
        }
        return sum;
    }

private:
    // Least squares loses digits where values lie far from zero; around their mean it does not.
    QUANTLAB_INLINE void centre() {
        low_ = high_ = L::load(values_);
        weight_ = L::zero();
        L sum = L::zero();
        for (int j = 0; j < block_columns; ++j) {
            const L value = L::load(values_ + j * lanes);
            const L weight = L::load(weights_ + j * lanes);
            low_ = L::min(low_, value);
            high_ = L::max(high_, value);
            weight_ = weight_ + weight;
            sum = L::fma(weight, value, sum);
        }
        mean_ = range_.has_offset ? sum / weight_ : L::zero();
    }

    QUANTLAB_INLINE void scan_ends() {
        const float last = range_.most - range_.least;
        const L step = (high_ - low_) * L::broadcast(1.0f / last);
        const float widest = 0.4f * last < 5.0f ? 0.4f * last : 5.0f;
        const float pace = (widest + 0.5f) / static_cast<float>(effort_.clips - 1);
        for (int i = 0; i < effort_.clips; ++i) {
            for (int j = 0; j < effort_.clips; ++j) {
                const float below = -0.5f + pace * static_cast<float>(i), above = -0.5f + pace * static_cast<float>(j);
                const L offset = L::fma(step, L::broadcast(below), low_);
                improve({step * L::broadcast((last - below - above) / last), offset});
            }
        }
    }

    QUANTLAB_INLINE void scan_steps() {
        const L zero = L::zero();
        const L largest = L::max(high_, zero - low_);
        const float codes = range_.most > -range_.least ? range_.most : -range_.least;
        const int count = 3 * effort_.clips;
        const float widest = 0.5f * codes < 6.0f ? 0.5f * codes : 6.0f;
        const float pace = (widest + 0.9f) / static_cast<float>(count - 1);
        for (int i = 0; i < count; ++i) {
            const L step = largest * L::broadcast(1.0f / (codes - 0.9f + pace * static_cast<float>(i)));
            improve({step, zero});
            if (range_.most != -range_.least) {
                improve({zero - step, zero});
            }
        }
    }

    // Solves for the scales that suit the codes of `tried` best, and keeps them if they beat the best so far.
    QUANTLAB_INLINE void improve(Scales<L> tried) {
        const L inverse = inverse_or_zero(tried.step);
        L first = L::zero(), second = L::zero(), product = L::zero();
        for (int j = 0; j < block_columns; ++j) {
            const L value = L::load(values_ + j * lanes);
            const L code = nearest_code(value, tried.offset, inverse, range_) - middle_;
            const L weighted = code * L::load(weights_ + j * lanes);
            first = first + weighted;
            second = L::fma(weighted, code, second);
            product = L::fma(weighted, value - mean_, product);
        }
        const L spread = range_.has_offset ? second - first * first / weight_ : second;
        const L step = product / spread;
        const L offset = range_.has_offset ? mean_ - step * (first / weight_ + middle_) : L::zero();
        // Where all codes are alike the spread is nothing but rounding.
        const auto is_spread = L::greater(spread, second * L::broadcast(1e-6f));
        keep_better(L::select(is_spread, product * step, L::zero()), {step, offset});
    }

    QUANTLAB_INLINE void keep_better(L gain, Scales<L> solved) {
        const auto better = L::greater(gain, best_gain_);  // false for NaN
        best_gain_ = L::select(better, gain, best_gain_);
        best_.step = L::select(better, solved.step, best_.step);
        best_.offset = L::select(better, solved.offset, best_.offset);
    }

    QUANTLAB_INLINE Scales<L> best_halves() const {
        const Scales<L> rounded{to_half(best_.step), to_half(best_.offset)};
        Scales<L> best = rounded;
        L least = error(rounded);
        const int reach = range_.has_offset ? 1 : 0;
        for (int i = -1; i <= 1; ++i) {
            for (int j = -reach; j <= reach; ++j) {
                if (i == 0 && j == 0) {
                    continue;
                }
                const Scales<L> tried{next_half(rounded.step, i), next_half(rounded.offset, j)};
                const L found = error(tried);
                const auto better = L::greater(least, found);
                least = L::select(better, found, least);
                best.step = L::select(better, tried.step, best.step);
                best.offset = L::select(better, tried.offset, best.offset);
            }
        }
        return best;
    }

    // The half-precision number `by` places further from zero; zero and infinity stay.
    static QUANTLAB_INLINE L next_half(L value, int by) {
        std::uint16_t halves[lanes];
        value.store_half(halves);
        for (std::uint16_t& half : halves) {
            const int magnitude = half & 0x7fff;
            if (magnitude > 1 && magnitude < half_infinity_bits - 1) {
                half = static_cast<std::uint16_t>(half + by);
            }
        }
        return L::load_half(halves);
    }

    const float* values_;
    const float* weights_;
    const CodeRange& range_;
    const SearchEffort& effort_;
    L middle_;
    L mean_ = L::zero();
    L weight_ = L::zero();
    L low_ = L::zero();
    L high_ = L::zero();
    Scales<L> best_ = {L::zero(), L::zero()};
    L best_gain_ = L::zero();
};

}  // namespace quantlab::quantizers
