#include "quantizers.h"
#include "row_parts.h"

#include <algorithm>
#include <vector>

namespace quantlab::quantizers {

void measure_errors(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, int threads,
                    RowMeasures* measures) {
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        float product[block_lanes];
        for (RowGroup& group : groups) {
            if (weight.bytes != nullptr) {
                group.read_blocks();
            }
            std::fill_n(measures + group.first_row(), group.rows(), RowMeasures{0.0, 0.0});
        }
        for (std::int64_t block = 0; block < weight.blocks(); ++block) {
            const std::int64_t first = block * block_columns;
            for (RowGroup& group : groups) {
                const float* values = weight.bytes == nullptr ? group.weights(0) : group.errors(0);
                RowMeasures* of_group = measures + group.first_row();
                // Blocks before this one count twice, since the moment is symmetric.
                std::fill_n(product, block_lanes, 0.0f);
                kernel.add_products(moment.panel(block), values, first, product);
                for (float& sum : product) {
                    sum *= 2.0f;
                }
                kernel.add_products(moment.tile(block, block), values + first * lanes, block_columns, product);
                for (int j = 0; j < block_columns; ++j) {
                    for (int row = 0; row < group.rows(); ++row) {
                        const double value = values[(first + j) * lanes + row];
                        of_group[row].weighted += value * product[j * lanes + row];
                        of_group[row].plain += value * value;
                    }
                }
            }
        }
    });
}

}  // namespace quantlab::quantizers
