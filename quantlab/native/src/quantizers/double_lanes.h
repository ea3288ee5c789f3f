// Eight doubles, for the Cholesky factor of a second moment, in one class per instruction set; see engine/lanes.h.
#pragma once

#include "../engine/lanes.h"

#include <cmath>
#include <cstring>

namespace quantlab::quantizers {

inline constexpr int double_lanes = 8;

class ScalarDoubles {
public:
    using D = ScalarDoubles;
    static D load(const double* values) {
        D result;
        std::memcpy(result.lanes_, values, sizeof result.lanes_);
        return result;
    }
    void store(double* values) const { std::memcpy(values, lanes_, sizeof lanes_); }

    // c - a * b, rounded once.
    static D subtract_product(double a, const D& b, const D& c) {
        D result;
        for (int i = 0; i < double_lanes; ++i) {
            result.lanes_[i] = std::fma(-a, b.lanes_[i], c.lanes_[i]);
        }
        return result;
    }

    D divided_by(double divisor) const {
        D result;
        for (int i = 0; i < double_lanes; ++i) {
            result.lanes_[i] = lanes_[i] / divisor;
        }
        return result;
    }

private:
    double lanes_[double_lanes];
};

#if defined(__AVX2__) && defined(__FMA__)

class Avx2Doubles {
public:
    using D = Avx2Doubles;
    static QUANTLAB_INLINE D load(const double* values) {
        return {_mm256_loadu_pd(values), _mm256_loadu_pd(values + 4)};
    }
    QUANTLAB_INLINE void store(double* values) const {
        _mm256_storeu_pd(values, low_);
        _mm256_storeu_pd(values + 4, high_);
    }
    static QUANTLAB_INLINE D subtract_product(double a, const D& b, const D& c) {
        const __m256d factor = _mm256_set1_pd(a);
        return {_mm256_fnmadd_pd(factor, b.low_, c.low_), _mm256_fnmadd_pd(factor, b.high_, c.high_)};
    }
    QUANTLAB_INLINE D divided_by(double divisor) const {
        return {_mm256_div_pd(low_, _mm256_set1_pd(divisor)), _mm256_div_pd(high_, _mm256_set1_pd(divisor))};
    }

private:
    QUANTLAB_INLINE Avx2Doubles(__m256d low, __m256d high) : low_(low), high_(high) {}

    __m256d low_;
    __m256d high_;
};

#endif

}  // namespace quantlab::quantizers
