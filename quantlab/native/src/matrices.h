// Whole matrices to and from blocks: rows over threads, and what the conversion found.
#pragma once

#include "kernels.h"

#include <cstdint>
#include <optional>

namespace quantlab {

// A place in a matrix: the row, and the column or block in it.
struct Position {
    std::int64_t row;
    std::int64_t index;
};

// The first weight that is NaN or infinite, and the first block of finite weights whose scale or minimum is beyond
// half precision, each in row-major order.
struct Faults {
    std::optional<Position> not_finite;
    std::optional<Position> overflow;
};

// `columns` is a multiple of weights_per_block; weights and bytes are row-major without gaps, at any address.
struct MatrixShape {
    std::int64_t rows;
    std::int64_t columns;
};

// Encodes every row, whatever its faults. `sums` is null or has one element a row. Bytes and sums do not depend on
// `threads` (at least 1), the most to use: small matrices take fewer.
Faults quantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* weights,
                       MatrixShape shape, std::int32_t levels, int threads, std::uint8_t* bytes, RowSums* sums);

void dequantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* bytes,
                       MatrixShape shape, int threads, std::uint8_t* weights);

}  // namespace quantlab
