// Multiplication by quantized weights that stay as files hold them: a tile of rows at a time is interleaved on the way.
#pragma once

#include "packed_matrix.h"
#include "thread_pool.h"

#include <cstdint>

namespace quantlab::engine {

// A matrix in the file's layout: rows of blocks without gaps, at any address.
struct FileRows {
    WeightType type;  // quantized
    std::int64_t rows;
    int columns;  // a multiple of columns_unit(type)
    const std::uint8_t* bytes;
};

// Writes out[t * rows + row] for `count` tokens: the product with `values`, [count][columns], rounded to int8 by
// quantize_token or quantize_row, as the type wants it. The bits are those of PackedMatrix::multiply for the same rows and codes, whatever the pool and the
// count. Beyond `out` it needs count * columns * 1.25 bytes and a tile of interleaved rows a thread, no more than
// some 128 KiB unless sixteen rows are larger. Throws std::bad_alloc.
void multiply_file_rows(const FileRows& weights, const float* values, int count, float* out, ThreadPool& pool);

}  // namespace quantlab::engine
