// Low-rank updates, scale * (B @ A), and what they do to blocks. An update is computed in tiles and never held whole;
// threads split the rows and nothing else, so bits do not depend on their number.
#pragma once

#include "../blocks.h"
#include "../matrices.h"
#include "kernels.h"

#include <cstdint>
#include <optional>

namespace quantlab::adapters {

// `a` [rank, columns] and `b` [rows, rank], row-major; `scale` is finite.
struct LowRank {
    const float* a;
    const float* b;
    float scale;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t rank;
};

// The first element, in row-major order, that is NaN or infinite.
std::optional<Position> first_not_finite(const UpdateKernel& kernel, const LowRank& update, int threads);

// `out` [rows, columns].
void multiply(const UpdateKernel& kernel, const LowRank& update, int threads, float* out);

// Blocks with the same scales and minima, their codes moved by the update, which must be finite and have the blocks'
// rows and columns; see UpdateKernel::move_codes. Blocks with a scale of zero, or a scale or minimum that is NaN or
// infinite, stay as they are. `out` may be `blocks`.
void rechoose_codes(const UpdateKernel& kernel, const BlockFormat& format, std::int32_t levels, const LowRank& update,
                    int threads, const std::uint8_t* blocks, std::uint8_t* out);

}  // namespace quantlab::adapters
