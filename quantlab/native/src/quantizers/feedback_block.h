// One block of sixteen rows with error feedback among its 32 columns, in processing order.
//
// With the second moment H = R R^T, R upper triangular, and E the rounding errors of the columns done so far, the
// weighted error of a row is the sum over columns j of R_jj^2 (t_j - q_j)^2, where t_j = w_j + sum over i < j of
// E_i R_ij / R_jj: the column's target. (GPTQ, arXiv 2210.17323, in the form of LDLQ, arXiv 2307.13304: no inverse.)
#pragma once

#include "scale_search.h"

namespace quantlab::quantizers {

// All arrays of columns are in processing order.
struct FeedbackBlock {
    const float* weights;      // [32][16]
    const float* targets;      // [32][16], with the feedback of all earlier blocks
    const float* factors;      // [32][32], R_ij / R_jj at [i][j] for i < j
    const float* pivots;       // [32], R_jj^2
    const float* importances;  // [32][16], for the search of the scales; unused by others
    float* steps;              // in half precision: [16] to be found, or [32][16] given for each column
    float* offsets;            // likewise
    float* codes;              // [32][16]
    float* errors;             // [32][16], weight less decoded weight
};

// `trials`: rounds of moving the block's ends, each with smaller moves, by the error that feedback leaves.
struct FeedbackEffort {
    SearchEffort search;
    int trials;
};

inline constexpr float largest_move = 1.0f;  // steps
inline constexpr float move_decay = 0.65f;

template <typename L>
class BlockFeedback {
public:
    BlockFeedback(const FeedbackBlock& block, const CodeRange& range) : block_(block), range_(range) {}

    QUANTLAB_INLINE void find_scales(const FeedbackEffort& effort) {
        ScaleSearch<L> search(block_.targets, block_.importances, range_, effort.search);
        best_ = search.run();
        least_ = run(best_);
        try_ends(effort.trials);
        best_.step.store(block_.steps);
        best_.offset.store(block_.offsets);
    }

    // Quantizes anew, with the same scales and with others, a block that has scales and codes; rows where that does not
    // lower the error stay as they are.
    QUANTLAB_INLINE void improve(int trials) {
        float codes[block_lanes];
        for (int j = 0; j < block_columns; ++j) {
            L::load(block_.codes + j * lanes).store(codes + j * lanes);
        }
        best_ = {L::load(block_.steps), L::load(block_.offsets)};
        least_ = error_of_codes();
        keep_better(best_);
        try_ends(trials);
        run(best_);
        const auto is_new = L::greater(is_new_, L::zero());
        for (int j = 0; j < block_columns; ++j) {
            const L chosen = L::select(is_new, L::load(block_.codes + j * lanes), L::load(codes + j * lanes));
            chosen.store(block_.codes + j * lanes);
        }
        best_.step.store(block_.steps);
        best_.offset.store(block_.offsets);
    }

    // Chooses the codes for one pair of scales, and returns the weighted error.
    QUANTLAB_INLINE L run(const Scales<L>& scales) {
        const L inverse = inverse_or_zero(scales.step);
        return sweep([&](int j, L target) {
            const L code = nearest_code(target, scales.offset, inverse, range_);
            code.store(block_.codes + j * lanes);
            return scales.step * code + scales.offset;
        });
    }

    // Chooses the codes for each column's own scales.
    QUANTLAB_INLINE void run_columns() {
        sweep([&](int j, L target) {
            const L step = L::load(block_.steps + j * lanes), offset = L::load(block_.offsets + j * lanes);
            const L code = nearest_code(target, offset, inverse_or_zero(step), range_);
            code.store(block_.codes + j * lanes);
            return step * code + offset;
        });
    }

private:
    // The weighted error of the codes that the block has.
    QUANTLAB_INLINE L error_of_codes() {
        const L step = L::load(block_.steps), offset = L::load(block_.offsets);
        return sweep([&](int j, L) { return step * L::load(block_.codes + j * lanes) + offset; });
    }

    // Goes through the columns in order, each error handed on to the columns after it; decoded(j, target): a column's
    // value. Returns the weighted error. Errors of four columns are handed on together to those behind them, which are
    // read and written once for it; each target's sum still runs in ascending order of columns.
    template <typename Decoded>
    QUANTLAB_INLINE L sweep(const Decoded& decoded) {
        constexpr int run = 4;
        L sum = L::zero();
        const float* pending = block_.targets;
        for (int first = 0; first < block_columns; first += run) {
            L targets[run], errors[run];
            for (int r = 0; r < run; ++r) {
                targets[r] = L::load(pending + (first + r) * lanes);
            }
            const float* factors = block_.factors + first * block_columns;
            for (int r = 0; r < run; ++r) {
                const int j = first + r;
                const L value = decoded(j, targets[r]), miss = targets[r] - value;
                errors[r] = L::load(block_.weights + j * lanes) - value;
                errors[r].store(block_.errors + j * lanes);
                sum = L::fma(miss * L::broadcast(block_.pivots[j]), miss, sum);
                for (int s = r + 1; s < run; ++s) {
                    targets[s] = L::fma(errors[r], L::broadcast(factors[r * block_columns + first + s]), targets[s]);
                }
            }
            for (int i = first + run; i < block_columns; ++i) {
                L target = L::load(pending + i * lanes);
                for (int r = 0; r < run; ++r) {
                    target = L::fma(errors[r], L::broadcast(factors[r * block_columns + i]), target);
                }
                target.store(pending_ + i * lanes);
            }
            pending = pending_;
        }
        return sum;
    }

    // Moves of all sizes, the largest first.
    QUANTLAB_INLINE void try_ends(int trials) {
        float move = largest_move;
        for (int trial = 0; trial < trials; ++trial) {
            move_ends(move);
            move *= move_decay;
        }
    }

    // Tries the eight ways of moving the ends of the range by so many steps.
    QUANTLAB_INLINE void move_ends(float move) {
        const Scales<L> start = best_;
        const float last = range_.most - range_.least;
        for (int below = -1; below <= 1; ++below) {
            for (int above = -1; above <= 1; ++above) {
                if (range_.has_offset ? (below != 0 || above != 0) : (below == 0 && above != 0)) {
                    const float grown = move * static_cast<float>(above - below) / last;
                    const L step = to_half(L::fma(start.step, L::broadcast(grown), start.step));
                    const L offset = L::fma(start.step, L::broadcast(move * static_cast<float>(below)), start.offset);
                    keep_better({step, range_.has_offset ? to_half(offset) : L::zero()});
                }
            }
        }
    }

    QUANTLAB_INLINE void keep_better(const Scales<L>& tried) {
        const L found = run(tried);
        const auto better = L::greater(least_, found * L::broadcast(1.0f + 1e-6f));  // by more than rounding
        least_ = L::select(better, found, least_);
        best_.step = L::select(better, tried.step, best_.step);
        best_.offset = L::select(better, tried.offset, best_.offset);
        is_new_ = L::select(better, L::broadcast(1.0f), is_new_);
    }

    const FeedbackBlock& block_;
    const CodeRange& range_;
    Scales<L> best_ = {L::zero(), L::zero()};
    L least_ = L::zero();
    L is_new_ = L::zero();  // lanes whose scales or codes are not those they came with: 1
    float pending_[block_lanes];
};

}  // namespace quantlab::quantizers
