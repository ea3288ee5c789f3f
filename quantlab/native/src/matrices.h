// Whole matrices to and from blocks: rows over threads, and what the conversion found.
#pragma once

#include "kernels.h"

#include <cstdint>
#include <optional>
#include <span>

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

// `columns` is a multiple of the format's block_weights; weights and bytes are row-major without gaps, at any address.
struct MatrixShape {
    std::int64_t rows;
    std::int64_t columns;
};

// Encodes every row, whatever its faults. `sums` is null or has one element a row. Bytes and sums do not depend on
// `threads` (at least 1), the most to use: small matrices take fewer.
Faults quantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* weights,
                       MatrixShape shape, std::int32_t levels, int threads, std::uint8_t* bytes, RowSums* sums);

// Of a whole tensor: the sum of the magnitudes of each block of BlockTQ2_0, row-major.
void sum_magnitudes(const Kernel& kernel, Element element, const std::uint8_t* weights, MatrixShape shape, int threads,
                    double* sums);

// The tensor's scale from the sums of all its blocks, in half precision: infinite beyond it, 0 of no blocks.
std::uint16_t ternary_scale(std::span<const double> block_sums);

struct TernaryTensor {
    std::uint16_t scale;
    std::optional<Position> not_finite;
};

// Encodes a whole tensor as BlockTQ2_0, or with a `scale` that is known part of one: weights that are not finite are
// not looked for then. Where a scale found here is not finite, every block becomes zeros with scale NaN. Otherwise as
// quantize_matrix.
TernaryTensor quantize_ternary(const Kernel& kernel, Element element, const std::uint8_t* weights, MatrixShape shape,
                               std::optional<std::uint16_t> scale, int threads, std::uint8_t* bytes, RowSums* sums);

void dequantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* bytes,
                       MatrixShape shape, int threads, std::uint8_t* weights);

}  // namespace quantlab
