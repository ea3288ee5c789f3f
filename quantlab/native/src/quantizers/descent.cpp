#include "moment_products.h"
#include "quantizers.h"
#include "rounding.h"
#include "row_parts.h"

#include <algorithm>
#include <vector>

namespace quantlab::quantizers {

namespace {

// One block of sixteen rows at a time, the errors of all others given.
class BlockVisit {
public:
    BlockVisit(const QuantizerKernel& kernel, const CodeRange& range, const DescentEffort& effort)
        : kernel_(kernel), range_(range), effort_(effort) {}

    // To be filled before each run: [32][16], the second moment times all errors.
    float* gradients() { return gradients_; }

    void run(RowGroup& group, std::int64_t block, const float* tile, const BlockFactor& factor) {
        const std::int64_t first = block * block_columns;
        if (effort_.trials >= 0 && factor.exists) {
            quantize_anew(group, block, tile, factor);
        }
        kernel_.descend({group.weights(first), tile, gradients_, group.steps(block), group.offsets(block),
                         group.codes(first), group.errors(first)},
                        range_, effort_);
    }

private:
    // As a function of the block alone, the weighted error is that of its distance to the values that would make up
    // for all other errors, weighted by the block's own tile.
    void quantize_anew(RowGroup& group, std::int64_t block, const float* tile, const BlockFactor& factor) {
        const std::int64_t first = block * block_columns;
        const float *weights = group.weights(first), *errors = group.errors(first);
        for (int i = 0; i < block_lanes; ++i) {
            changes_[i] = errors[i];
            targets_[i] = weights[i] - errors[i];
        }
        kernel_.add_products(factor.inverse, gradients_, block_columns, targets_);
        const FeedbackBlock task{targets_,
                                 targets_,
                                 factor.factors,
                                 factor.pivots,
                                 nullptr,
                                 group.steps(block),
                                 group.offsets(block),
                                 group.codes(first),
                                 scratch_};
        kernel_.improve(task, range_, effort_.trials);
        group.update_errors(block);
        for (int i = 0; i < block_lanes; ++i) {
            changes_[i] = errors[i] - changes_[i];
        }
        kernel_.add_products(tile, changes_, block_columns, gradients_);
    }

    const QuantizerKernel& kernel_;
    const CodeRange& range_;
    const DescentEffort& effort_;
    float gradients_[block_lanes], targets_[block_lanes], changes_[block_lanes], scratch_[block_lanes];
};

// Columns side by side: their sums do not wait for each other.
double tile_error(const float* tile, const double* errors) {
    double products[block_columns] = {};
    for (int i = 0; i < block_columns; ++i) {
        for (int j = 0; j < block_columns; ++j) {
            products[j] += errors[i] * tile[i * block_columns + j];
        }
    }
    double sum = 0.0;
    for (int j = 0; j < block_columns; ++j) {
        sum += errors[j] * products[j];
    }
    return sum;
}

}  // namespace

void descend(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, int sweeps,
             const DescentEffort& effort, int threads) {
    const CodeRange range = weight.range();
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        BlockVisit visit(kernel, range, effort);
        for (RowGroup& group : groups) {
            group.read_blocks();
        }
        for (int sweep = 0; sweep < sweeps; ++sweep) {
            for (std::int64_t block = 0; block < weight.blocks(); ++block) {
                for (RowGroup& group : groups) {
                    // Afresh from all errors: no rounding adds up over the sweeps.
                    multiply_block(kernel, moment, block, group.errors(0), visit.gradients());
                    visit.run(group, block, moment.tile(block, block), moment.factor(block));
                }
            }
        }
        for (const RowGroup& group : groups) {
            group.write_blocks();
        }
    });
}

void refine_blocks(const QuantizerKernel& kernel, const Kernel& rounding, const WeightView& weight, const float* tiles,
                   const DescentEffort& effort, int threads) {
    constexpr std::int64_t tile_size = block_columns * block_columns;
    const CodeRange range = weight.range();
    std::vector<BlockFactor> factors;
    for (std::int64_t block = 0; block < weight.blocks(); ++block) {
        factors.push_back(factor_block(tiles + block * tile_size));
    }
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        BlockVisit visit(kernel, range, effort);
        Rounding nearest(rounding, weight);
        for (RowGroup& group : groups) {
            for (int row = 0; row < group.rows(); ++row) {
                nearest.replace_worse(group.first_row() + row, [&](std::int64_t block, const double* errors) {
                    const bool counts = factors[static_cast<std::size_t>(block)].exists;
                    return counts ? tile_error(tiles + block * tile_size, errors) : 0.0;
                });
            }
            group.read_blocks();
            for (std::int64_t block = 0; block < weight.blocks(); ++block) {
                const float* tile = tiles + block * tile_size;
                if (!factors[static_cast<std::size_t>(block)].exists) {
                    continue;
                }
                std::fill_n(visit.gradients(), block_lanes, 0.0f);
                kernel.add_products(tile, group.errors(block * block_columns), block_columns, visit.gradients());
                visit.run(group, block, tile, factors[static_cast<std::size_t>(block)]);
            }
            group.write_blocks();
        }
    });
}

}  // namespace quantlab::quantizers
