// Sixteen rows side by side, a lane a row, times a panel of 32 columns: the inner loop of every Hessian product.
#pragma once

#include "../engine/lanes.h"
#include "block_codes.h"

#include <algorithm>
#include <cstdint>

namespace quantlab::quantizers {

inline constexpr int lanes = engine::lane_count;
inline constexpr int block_lanes = block_columns * lanes;  // values of one block of sixteen rows, [32][16]

// out[c] += sum over k of values[k] * panel[k][c], for values [count][16], panel [count][32] and out [32][16]; the sum
// runs in ascending k, one fused multiply-add each, whatever the instruction set.
template <typename L>
QUANTLAB_INLINE void add_products(const float* panel, const float* values, std::int64_t count, float* out) {
    constexpr std::int64_t run = 128;  // values and panel of one run stay in the first-level cache
    constexpr int tile = 4;            // columns whose sums fill the registers
    for (std::int64_t first = 0; first < count; first += run) {
        const std::int64_t last = std::min(first + run, count);
        for (int column = 0; column < block_columns; column += tile) {
            float* sums = out + column * lanes;
            L a = L::load(sums), b = L::load(sums + lanes);
            L c = L::load(sums + 2 * lanes), d = L::load(sums + 3 * lanes);
            for (std::int64_t k = first; k < last; ++k) {
                const L value = L::load(values + k * lanes);
                const float* factors = panel + k * block_columns + column;
                a = L::fma(value, L::broadcast(factors[0]), a);
                b = L::fma(value, L::broadcast(factors[1]), b);
                c = L::fma(value, L::broadcast(factors[2]), c);
                d = L::fma(value, L::broadcast(factors[3]), d);
            }
            a.store(sums);
            b.store(sums + lanes);
            c.store(sums + 2 * lanes);
            d.store(sums + 3 * lanes);
        }
    }
}

}  // namespace quantlab::quantizers
