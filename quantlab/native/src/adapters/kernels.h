// The inner loops of low-rank updates in one variant for each instruction set; all give the same bits.
#pragma once

#include "../engine/lanes.h"
#include "../quantizers/block_codes.h"

#include <cstdint>

namespace quantlab::adapters {

inline constexpr int panel_columns = weights_per_block;
inline constexpr int tile_rows = 4;  // eight sums of eight lanes, beside one product each: the registers of AVX2

// [tile_rows][panel_columns] of an update, row by row.
using Tile = float[tile_rows * panel_columns];

struct UpdateKernel {
    // `panel` [rank][panel_columns], `rows` tile_rows pointers to [rank] each: scale * (rows @ panel).
    //
    // The one arithmetic of updates, all of it fp32: from +0 on, products are rounded and then added in ascending order
    // over the rank; the sum is multiplied by `scale`. No fused multiply-add: so array libraries, which have none, get
    // the same bits from a loop over the rank, on accelerators too.
    void (*products)(const float* panel, const float* const* rows, std::int64_t rank, float scale, float* tile);

    // Moves each of a block's 32 codes to that nearest to code + update / step in exact arithmetic, within `range` or
    // no further out than it lay; between two equally near, to the one nearer to where it lay. `step` is a finite
    // half-precision number other than 0, updates are finite.
    void (*move_codes)(const float* updates, float step, const quantizers::CodeRange& range, std::int8_t* codes);
};

// distance / size to the nearest whole number, halves down. `quotient` is that up to its rounding, which may be on the
// wrong side of a half or on it: (count +- 1/2) * size is exact in fp32, 11 bits times 11, and decides. L: lanes of
// engine/lanes.h.
template <typename L>
QUANTLAB_INLINE L nearest_count(const L& distance, const L& quotient, const L& size) {
    constexpr float beyond = 512.0f;  // any range of codes
    const L half = L::broadcast(0.5f), one = L::broadcast(1.0f), zero = L::zero();
    const L count = L::round(L::min(quotient, L::broadcast(beyond)));
    const L up = L::select(L::greater(distance, (count + half) * size), one, zero);
    const L down = L::select(L::greater(distance, (count - half) * size), zero, one);
    return count + up - down;
}

template <typename L>
struct Kernels {
    static void products(const float* panel, const float* const* rows, std::int64_t rank, float scale, float* tile) {
        for (int half = 0; half < panel_columns; half += engine::lane_count) {
            L sums[tile_rows] = {L::zero(), L::zero(), L::zero(), L::zero()};
            for (std::int64_t k = 0; k < rank; ++k) {
                const L values = L::load(panel + k * panel_columns + half);
                for (int row = 0; row < tile_rows; ++row) {
                    sums[row] = sums[row] + L::broadcast(rows[row][k]) * values;
                }
            }
            for (int row = 0; row < tile_rows; ++row) {
                (sums[row] * L::broadcast(scale)).store(tile + row * panel_columns + half);
            }
        }
    }

    static void move_codes(const float* updates, float step, const quantizers::CodeRange& range, std::int8_t* codes) {
        const L inverse = L::broadcast(1.0f / step), size = L::broadcast(step < 0.0f ? -step : step);
        const L zero = L::zero();
        for (int half = 0; half < weights_per_block; half += engine::lane_count) {
            const L update = L::load(updates + half);
            const L moved = update * inverse;
            const L count = nearest_count(L::abs(update), L::abs(moved), size);
            const L code = L::load_int8(codes + half);
            const L wanted = code + L::select(L::greater(zero, moved), zero - count, count);
            const L least = L::min(L::broadcast(range.least), code), most = L::max(L::broadcast(range.most), code);
            L::min(L::max(wanted, least), most).store_int8(codes + half);
        }
    }

    static constexpr UpdateKernel table{products, move_codes};
};

const UpdateKernel& scalar_updates();

// The variant for x86 processors with AVX2, FMA and F16C; nullptr where this build or this processor has none.
const UpdateKernel* avx2_updates();

// That of the chosen instruction set (instruction_set.h), AVX2's for those beyond.
const UpdateKernel& chosen_updates();

}  // namespace quantlab::adapters
