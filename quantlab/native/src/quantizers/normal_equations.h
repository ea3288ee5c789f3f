// The joint least squares for all scales of a row, sixteen rows at a time: a lane is a row's own system of equations.
#pragma once

#include "products.h"

#include <cstdint>

namespace quantlab::quantizers {

// Where element (i, j), j <= i, of a symmetric matrix lies, in units of sixteen lanes.
constexpr std::int64_t triangle_place(std::int64_t i, std::int64_t j) { return i * (i + 1) / 2 + j; }

inline constexpr std::int64_t unknowns_at_once = 4;  // systems are padded to a multiple of it

// For blocks a and b of a row with codes [32][16] and the second moment [b's 32][a's 32] between them: the products of
// b's codes with a's codes and with ones, [16] each.
template <typename L>
QUANTLAB_INLINE void moment_products(const float* moments, const float* codes_b, const float* codes_a,
                                     float* with_codes, float* with_ones) {
    float sums[block_lanes] = {};
    add_products<L>(moments, codes_b, block_columns, sums);
    L codes = L::zero(), ones = L::zero();
    for (int i = 0; i < block_columns; ++i) {
        const L sum = L::load(sums + i * lanes);
        codes = L::fma(L::load(codes_a + i * lanes), sum, codes);
        ones = ones + sum;
    }
    codes.store(with_codes);
    ones.store(with_ones);
}

// Cholesky factors L L^T = `matrix` [triangle][16] in place, and `right` [count][16] replaced by the solution. A pivot
// below a millionth of its diagonal element counts as that much: its unknown hardly moves then.
template <typename L>
class LaneSystem {
public:
    LaneSystem(float* matrix, std::int64_t count) : matrix_(matrix), count_(count) {}

    QUANTLAB_INLINE void factor() {
        for (std::int64_t i = 0; i < count_; ++i) {
            for (std::int64_t first = 0; first <= i; first += unknowns_at_once) {
                factor_run(i, first);
            }
        }
    }

    QUANTLAB_INLINE void solve(float* right) const {
        for (std::int64_t i = 0; i < count_; ++i) {
            L sum = L::load(right + i * lanes);
            for (std::int64_t k = 0; k < i; ++k) {
                sum = L::fma(L::zero() - element(i, k), L::load(right + k * lanes), sum);
            }
            (sum / element(i, i)).store(right + i * lanes);
        }
        for (std::int64_t i = count_; i-- > 0;) {
            const L solved = L::load(right + i * lanes) / element(i, i);
            solved.store(right + i * lanes);
            for (std::int64_t k = 0; k < i; ++k) {
                const L rest = L::load(right + k * lanes);
                L::fma(L::zero() - element(i, k), solved, rest).store(right + k * lanes);
            }
        }
    }

    // x^T (L L^T) x for `vector` [count][16]; `scratch` [count][16].
    QUANTLAB_INLINE L square_of(const float* vector, float* scratch) const {
        for (std::int64_t k = 0; k < count_; ++k) {
            L::zero().store(scratch + k * lanes);
        }
        for (std::int64_t i = 0; i < count_; ++i) {
            const L value = L::load(vector + i * lanes);
            for (std::int64_t k = 0; k <= i; ++k) {
                L::fma(element(i, k), value, L::load(scratch + k * lanes)).store(scratch + k * lanes);
            }
        }
        L sum = L::zero();
        for (std::int64_t k = 0; k < count_; ++k) {
            const L value = L::load(scratch + k * lanes);
            sum = L::fma(value, value, sum);
        }
        return sum;
    }

private:
    QUANTLAB_INLINE L element(std::int64_t i, std::int64_t j) const {
        return L::load(matrix_ + triangle_place(i, j) * lanes);
    }

    // Elements (i, first) to (i, first + 3), the last of them (i, i) where the diagonal is reached.
    QUANTLAB_INLINE void factor_run(std::int64_t i, std::int64_t first) {
        float* row = matrix_ + triangle_place(i, 0) * lanes;
        const std::int64_t end = first + unknowns_at_once <= i + 1 ? unknowns_at_once : i + 1 - first;
        const float* rows[unknowns_at_once];
        for (std::int64_t r = 0; r < unknowns_at_once; ++r) {
            rows[r] = matrix_ + triangle_place(first + (r < end ? r : 0), 0) * lanes;
        }
        L sums[unknowns_at_once] = {L::zero(), L::zero(), L::zero(), L::zero()};
        for (std::int64_t k = 0; k < first; ++k) {
            const L value = L::load(row + k * lanes);
            sums[0] = L::fma(value, L::load(rows[0] + k * lanes), sums[0]);
            sums[1] = L::fma(value, L::load(rows[1] + k * lanes), sums[1]);
            sums[2] = L::fma(value, L::load(rows[2] + k * lanes), sums[2]);
            sums[3] = L::fma(value, L::load(rows[3] + k * lanes), sums[3]);
        }
        for (std::int64_t r = 0; r < end; ++r) {
            const std::int64_t j = first + r;
            for (std::int64_t k = first; k < j; ++k) {
                sums[r] = L::fma(L::load(row + k * lanes), L::load(rows[r] + k * lanes), sums[r]);
            }
            const L original = L::load(row + j * lanes), rest = original - sums[r];
            if (j < i) {
                (rest / L::load(rows[r] + j * lanes)).store(row + j * lanes);
            } else {
                L::sqrt(L::max(rest, original * L::broadcast(1e-6f))).store(row + j * lanes);
            }
        }
    }

    float* matrix_;
    std::int64_t count_;
};

}  // namespace quantlab::quantizers
