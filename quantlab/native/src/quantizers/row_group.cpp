#include "row_group.h"

#include <algorithm>
#include <cstddef>

namespace quantlab::quantizers {

RowGroup::RowGroup(const WeightView& weight, std::int64_t first)
    : weight_(weight), first_(first), rows_(static_cast<int>(std::min<std::int64_t>(lanes, weight.rows - first))),
      weights_(static_cast<std::size_t>(weight.columns * lanes)), errors_(weights_.size()), codes_(weights_.size()),
      steps_(static_cast<std::size_t>(weight.blocks() * lanes)), offsets_(steps_.size()) {
    for (int row = 0; row < rows_; ++row) {
        const float* source = weight.values + (first + row) * weight.columns;
        for (std::int64_t column = 0; column < weight.columns; ++column) {
            weights(column)[row] = source[column];
        }
    }
}

void RowGroup::read_blocks() {
    for (int row = 0; row < rows_; ++row) {
        const std::uint8_t* bytes = weight_.bytes + (first_ + row) * weight_.row_bytes();
        for (std::int64_t block = 0; block < weight_.blocks(); ++block) {
            const OpenBlock open = weight_.access().open(bytes + block * weight_.format->block_bytes);
            steps(block)[row] = float_from_half(open.step);
            offsets(block)[row] = float_from_half(open.offset);
            for (int j = 0; j < block_columns; ++j) {
                codes(block * block_columns + j)[row] = open.codes[j];
            }
        }
    }
    for (std::int64_t block = 0; block < weight_.blocks(); ++block) {
        update_errors(block);
    }
}

void RowGroup::update_errors(std::int64_t block) {
    for (std::int64_t column = block * block_columns; column < (block + 1) * block_columns; ++column) {
        for (int row = 0; row < lanes; ++row) {
            const float decoded = steps(block)[row] * codes(column)[row] + offsets(block)[row];
            errors(column)[row] = weights(column)[row] - decoded;
        }
    }
}

void RowGroup::write_blocks() const {
    const auto blocks = weight_.blocks();
    for (int row = 0; row < rows_; ++row) {
        std::uint8_t* bytes = weight_.bytes + (first_ + row) * weight_.row_bytes();
        for (std::int64_t block = 0; block < blocks; ++block) {
            const auto scale = static_cast<std::size_t>(block * lanes + row);
            OpenBlock open = {half_from_float(steps_[scale]), half_from_float(offsets_[scale]), {}};
            for (int j = 0; j < block_columns; ++j) {
                const auto place = static_cast<std::size_t>((block * block_columns + j) * lanes + row);
                open.codes[j] = static_cast<std::int8_t>(codes_[place]);
            }
            weight_.access().close(open, bytes + block * weight_.format->block_bytes);
        }
    }
}

}  // namespace quantlab::quantizers
