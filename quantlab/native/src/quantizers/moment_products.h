// The second moment times sixteen rows.
#pragma once

#include "row_group.h"
#include "second_moment.h"

#include <algorithm>

namespace quantlab::quantizers {

// The columns of one block, [32][16], of the product of `rows` [columns][16] with the second moment.
inline void multiply_block(const QuantizerKernel& kernel, const SecondMoment& moment, std::int64_t block,
                           const float* rows, float* product) {
    std::fill_n(product, block_lanes, 0.0f);
    kernel.add_products(moment.panel(block), rows, moment.columns(), product);
}

}  // namespace quantlab::quantizers
