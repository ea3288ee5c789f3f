// Sixteen rows of a weight side by side, quantized or about to be, and the way from and to blocks.
#pragma once

#include "kernels.h"

#include <cstdint>
#include <vector>

namespace quantlab::quantizers {

// One weight matrix: fp32 [rows, columns], row-major, and its blocks, uint8 [rows, row bytes].
struct WeightView {
    const float* values;
    std::int64_t rows;
    std::int64_t columns;
    const BlockFormat* format;
    std::int32_t levels;
    std::uint8_t* bytes;

    std::int64_t blocks() const { return columns / block_columns; }
    std::int64_t row_bytes() const { return blocks() * format->block_bytes; }
    const BlockAccess& access() const { return block_access[format->index]; }
    CodeRange range() const { return access().range(levels); }
};

// Rows first to first + 15; lanes beyond the last row hold zeros.
class RowGroup {
public:
    RowGroup(const WeightView& weight, std::int64_t first);

    float* weights(std::int64_t column) { return weights_.data() + column * lanes; }
    float* errors(std::int64_t column) { return errors_.data() + column * lanes; }
    float* codes(std::int64_t column) { return codes_.data() + column * lanes; }
    float* steps(std::int64_t block) { return steps_.data() + block * lanes; }
    float* offsets(std::int64_t block) { return offsets_.data() + block * lanes; }
    std::int64_t first_row() const { return first_; }
    int rows() const { return rows_; }

    void read_blocks();  // codes, scales and errors
    void update_errors(std::int64_t block);
    void write_blocks() const;

private:
    const WeightView& weight_;
    std::int64_t first_;
    int rows_;
    std::vector<float> weights_, errors_, codes_;  // [columns][16]
    std::vector<float> steps_, offsets_;           // [blocks][16]
};

}  // namespace quantlab::quantizers
