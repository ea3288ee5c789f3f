// One block of sixteen rows moved to a lower weighted error: coordinate descent over its codes, then its scales.
#pragma once

#include "scale_search.h"

namespace quantlab::quantizers {

struct DescentBlock {
    const float* weights;  // [32][16]
    const float* moments;  // [32][32], the second moment within the block
    float* gradients;      // [32][16], second moment times errors; kept up to date
    float* steps;          // [16] in half precision
    float* offsets;        // [16]
    float* codes;          // [32][16]
    float* errors;         // [32][16], weight less decoded weight: written by update_errors
};

template <typename L>
class BlockDescent {
public:
    BlockDescent(const DescentBlock& block, const CodeRange& range) : block_(block), range_(range) {}

    // Each column in turn takes the code that leaves the least error, the others given.
    QUANTLAB_INLINE void move_codes() {
        const L step = L::load(block_.steps), inverse = inverse_or_zero(step);
        for (int j = 0; j < block_columns; ++j) {
            const float moment = block_.moments[j * block_columns + j];
            if (!(moment > 0.0f)) {
                continue;
            }
            const L code = L::load(block_.codes + j * lanes);
            const L gradient = L::load(block_.gradients + j * lanes);
            const L wanted = code + L::round(gradient * L::broadcast(1.0f / moment) * inverse);
            const L moved = L::min(L::max(wanted, L::broadcast(range_.least)), L::broadcast(range_.most));
            const L change = step * (moved - code);
            if (L::abs(change).fold_max() > 0.0f) {
                moved.store(block_.codes + j * lanes);
                subtract_column(j, change);
            }
        }
    }

    // Least squares for step and offset, rounded to half precision, where that lowers the error.
    QUANTLAB_INLINE void move_scales() {
        const L zero = L::zero(), one = L::broadcast(1.0f);
        L step_slope = zero, offset_slope = zero;                  // of codes and ones with the gradient
        L step_square = zero, cross = zero, offset_square = zero;  // of codes and ones with each other
        for (int i = 0; i < block_columns; ++i) {
            const L code = L::load(block_.codes + i * lanes), gradient = L::load(block_.gradients + i * lanes);
            L with_codes = zero;
            float with_ones = 0.0f;
            for (int j = 0; j < block_columns; ++j) {
                const float moment = block_.moments[i * block_columns + j];
                with_codes = L::fma(L::load(block_.codes + j * lanes), L::broadcast(moment), with_codes);
                with_ones += moment;
            }
            step_slope = L::fma(code, gradient, step_slope);
            offset_slope = offset_slope + gradient;
            step_square = L::fma(code, with_codes, step_square);
            cross = cross + with_codes;
            offset_square = offset_square + L::broadcast(with_ones);
        }
        const L step = L::load(block_.steps), offset = L::load(block_.offsets);
        L step_move = step_slope / step_square, offset_move = zero;
        if (range_.has_offset) {
            const L determinant = step_square * offset_square - cross * cross;
            step_move = (step_slope * offset_square - offset_slope * cross) / determinant;
            offset_move = (offset_slope * step_square - step_slope * cross) / determinant;
        }
        step_move = to_half(step + step_move) - step;
        offset_move = to_half(offset + offset_move) - offset;
        const L fall = step_move * (step_slope + step_slope - step_move * step_square) +
                       offset_move * (offset_slope + offset_slope - offset_move * offset_square) -
                       step_move * offset_move * (cross + cross);
        const auto falls = L::greater(fall, zero);  // false for NaN
        apply(step, offset, L::select(falls, one, zero), step_move, offset_move);
    }

    QUANTLAB_INLINE void update_errors() {
        const L step = L::load(block_.steps), offset = L::load(block_.offsets);
        for (int j = 0; j < block_columns; ++j) {
            const L decoded = step * L::load(block_.codes + j * lanes) + offset;
            (L::load(block_.weights + j * lanes) - decoded).store(block_.errors + j * lanes);
        }
    }

private:
    QUANTLAB_INLINE void subtract_column(int j, L change) {
        const float* column = block_.moments + j * block_columns;
        for (int i = 0; i < block_columns; ++i) {
            float* gradient = block_.gradients + i * lanes;
            (L::load(gradient) - change * L::broadcast(column[i])).store(gradient);
        }
    }

    QUANTLAB_INLINE void apply(L step, L offset, L chosen, L step_move, L offset_move) {
        const auto moves = L::greater(chosen, L::zero());
        step_move = L::select(moves, step_move, L::zero());
        offset_move = L::select(moves, offset_move, L::zero());
        (step + step_move).store(block_.steps);
        (offset + offset_move).store(block_.offsets);
        for (int j = 0; j < block_columns; ++j) {
            const L change = step_move * L::load(block_.codes + j * lanes) + offset_move;
            subtract_column(j, change);
        }
    }

    const DescentBlock& block_;
    const CodeRange& range_;
};

}  // namespace quantlab::quantizers
