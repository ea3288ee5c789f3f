#include "quantizers.h"
#include "rounding.h"
#include "row_parts.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace quantlab::quantizers {

namespace {

struct BlockWeights {
    float columns[block_columns];
};

BlockWeights weights_of(const float* importance) {
    BlockWeights weights;
    std::copy_n(importance, block_columns, weights.columns);
    if (std::all_of(weights.columns, weights.columns + block_columns, [](float x) { return x == 0.0f; })) {
        std::fill_n(weights.columns, block_columns, 1.0f);
    }
    return weights;
}

// The mean squares of sixteen rows.
void mean_squares(RowGroup& group, std::int64_t columns, float* means) {
    double sums[lanes] = {};
    for (std::int64_t column = 0; column < columns; ++column) {
        for (int row = 0; row < lanes; ++row) {
            const double value = group.weights(column)[row];
            sums[row] += value * value;
        }
    }
    for (int row = 0; row < lanes; ++row) {
        means[row] = static_cast<float>(sums[row] / static_cast<double>(columns));
    }
}

}  // namespace

void search_scales(const QuantizerKernel& kernel, const Kernel& rounding, const WeightView& weight,
                   const float* importance, bool by_magnitude, const SearchEffort& effort, int threads) {
    const CodeRange range = weight.range();
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        Rounding nearest(rounding, weight);
        const auto weighted_error = [&](std::int64_t block, const double* errors) {
            const BlockWeights columns = weights_of(importance + block * block_columns);
            double sum = 0.0;
            for (int j = 0; j < block_columns; ++j) {
                sum += columns.columns[j] * (errors[j] * errors[j]);
            }
            return sum;
        };
        float weights[block_lanes], means[lanes];
        for (RowGroup& group : groups) {
            if (by_magnitude) {
                mean_squares(group, weight.columns, means);
            }
            for (std::int64_t block = 0; block < weight.blocks(); ++block) {
                const std::int64_t first = block * block_columns;
                const BlockWeights columns = weights_of(importance + first);
                for (int j = 0; j < block_columns; ++j) {
                    std::fill_n(weights + j * lanes, lanes, columns.columns[j]);
                    for (int row = 0; by_magnitude && row < lanes; ++row) {
                        const float value = group.weights(first + j)[row];
                        weights[j * lanes + row] *= std::sqrt(means[row] + value * value);
                    }
                }
                kernel.search({group.weights(first), weights, group.steps(block), group.offsets(block),
                               group.codes(first)},
                              range, effort);
            }
            group.write_blocks();
            for (int row = 0; row < group.rows(); ++row) {
                nearest.replace_worse(group.first_row() + row, weighted_error);
            }
        }
    });
}

}  // namespace quantlab::quantizers
