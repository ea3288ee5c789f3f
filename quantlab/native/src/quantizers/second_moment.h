// The second moment of a layer's inputs in the layouts that the quantizers read, and its triangular factor.
#pragma once

#include "kernels.h"

#include <cstdint>
#include <optional>
#include <vector>

namespace quantlab::quantizers {

// Symmetric, fp32 [columns, columns], as it was measured.
struct MomentView {
    const float* values;
    std::int64_t columns;
};

// What error feedback within a block needs, of the block's own tile [32][32] of a second moment, columns in storage
// order; and the inverse of the tile.
struct BlockFactor {
    bool exists;  // not where the tile is not positive definite
    float inverse[block_columns * block_columns];
    float factors[block_columns * block_columns];  // R_ij / R_jj at [i][j], i <= j
    float pivots[block_columns];                   // R_jj^2
};

BlockFactor factor_block(const float* tile);

// The second moment plus `damping` on its diagonal, in panels of 32 columns.
class SecondMoment {
public:
    SecondMoment(MomentView moment, float damping, int threads);

    std::int64_t columns() const { return columns_; }
    std::int64_t blocks() const { return columns_ / block_columns; }

    // [columns][32]: all rows of one block's columns.
    const float* panel(std::int64_t block) const { return panels_.data() + block * columns_ * block_columns; }
    // [32][32]: rows of block `of_rows`.
    const float* tile(std::int64_t of_rows, std::int64_t block) const {
        return panel(block) + of_rows * block_columns * block_columns;
    }
    // [columns]: each column's sum over the rows of a block.
    const float* block_sums(std::int64_t block) const { return sums_.data() + block * columns_; }

    const BlockFactor& factor(std::int64_t block) const { return factors_[static_cast<std::size_t>(block)]; }

private:
    std::int64_t columns_;
    std::vector<float> panels_;
    std::vector<float> sums_;
    std::vector<BlockFactor> factors_;
};

// R of H = R R^T, upper triangular, columns in processing order, as error feedback needs it: see feedback_block.h.
class FeedbackFactor {
public:
    // `order` holds the column that is processed first, second and so on. Nothing where the damped moment is not
    // positive definite.
    static std::optional<FeedbackFactor> of(const QuantizerKernel& kernel, MomentView moment, double damping,
                                            const std::int32_t* order, int threads);

    std::int64_t columns() const { return static_cast<std::int64_t>(order_.size()); }
    const std::vector<std::int32_t>& order() const { return order_; }

    // [32 * step + 32][32]: R_ij / R_jj for the columns j of a step and all rows i before them and among them.
    const float* panel(std::int64_t step) const { return panels_.data() + panel_place(step); }
    // R_jj^2 in processing order.
    const float* pivots() const { return pivots_.data(); }

private:
    static std::int64_t panel_place(std::int64_t step) { return block_columns * block_columns * step * (step + 1) / 2; }

    std::vector<std::int32_t> order_;
    std::vector<float> panels_;
    std::vector<float> pivots_;
};

}  // namespace quantlab::quantizers
