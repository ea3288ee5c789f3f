// The two inner loops of a Cholesky factor in double precision, H = U^T U with U upper triangular, panel by panel.
#pragma once

#include "double_lanes.h"

#include <cstdint>

namespace quantlab::quantizers {

inline constexpr std::int64_t panel_rows = 64;
inline constexpr std::int64_t tile_rows = 4;

// Eight columns right of a finished triangle: rows [count][8] at distance `stride` become those of U, and a copy
// [count][8] of them. `triangle` is U's [count][count] at distance `stride`.
template <typename D>
QUANTLAB_INLINE void finish_columns(const double* triangle, std::int64_t stride, std::int64_t count, double* columns,
                                    double* copy) {
    for (std::int64_t k = 0; k < count; ++k) {
        D::load(columns + k * stride).store(copy + k * double_lanes);
    }
    for (std::int64_t k = 0; k < count; ++k) {
        const double* row = triangle + k * stride;
        const D finished = D::load(copy + k * double_lanes).divided_by(row[k]);
        finished.store(copy + k * double_lanes);
        finished.store(columns + k * stride);
        for (std::int64_t r = k + 1; r < count; ++r) {
            double* rest = copy + r * double_lanes;
            D::subtract_product(row[r], finished, D::load(rest)).store(rest);
        }
    }
}

// rows[r][0..7] -= sum over k of left[k][r] * right[k][0..7], for four rows r at distance `stride`; left points into
// a copy [count][8], right is one.
template <typename D>
QUANTLAB_INLINE void subtract_tile(const double* left, const double* right, std::int64_t count, double* rows,
                                   std::int64_t stride) {
    D a = D::load(rows), b = D::load(rows + stride), c = D::load(rows + 2 * stride), d = D::load(rows + 3 * stride);
    for (std::int64_t k = 0; k < count; ++k) {
        const D value = D::load(right + k * double_lanes);
        const double* factors = left + k * double_lanes;
        a = D::subtract_product(factors[0], value, a);
        b = D::subtract_product(factors[1], value, b);
        c = D::subtract_product(factors[2], value, c);
        d = D::subtract_product(factors[3], value, d);
    }
    a.store(rows);
    b.store(rows + stride);
    c.store(rows + 2 * stride);
    d.store(rows + 3 * stride);
}

}  // namespace quantlab::quantizers
