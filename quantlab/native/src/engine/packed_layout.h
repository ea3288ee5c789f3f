// How sixteen rows lie in memory. A group of quantized rows is a run of blocks of 16 rows x 32 columns:
//
//   16 halves of d; 16 halves of m in the formats with a minimum
//   64 bytes of fifth bits in the 5-bit formats: bit c of byte 4 r + i is that of row r, column 4 c + i
//   codes, in vectors of 64 bytes with four bytes of each row:
//     4 and 5 bits: byte 4 r + i of vector j holds columns 4 j + i (low nibble) and 16 + 4 j + i (high) of row r
//     8 bits: byte 4 r + i of vector c holds column 4 c + i of row r, plus 128
//
// A group of ternary rows is a run of blocks of 16 rows x 256 columns:
//
//   16 halves of d
//   16 vectors of 64 bytes: byte 4 r + i of vector j, for j from 0 to 7, holds columns 4 j + i, 32 + 4 j + i,
//     64 + 4 j + i and 96 + 4 j + i of row r, two bits each, the first lowest; vectors 8 to 15 the same of columns 128 on.
//     So four bytes of a vector are four bytes of the file's block, and the four planes of bits are runs of 32 columns.
//
// A group of rows in f32, f16 or bf16 holds its columns one after the other, each with 16 elements. Rows beyond the
// last are zero bytes, which decode to zero in every format but q8_0: there d is 0.
#pragma once

#include "../blocks.h"
#include "packed_matrix.h"

#include <cstdint>

namespace quantlab::engine {

template <typename FileBlock>
struct BlockLayout {
    using File = FileBlock;
    static constexpr int columns = block_columns;
    static constexpr bool has_minimum = Affine<File>;
    static constexpr int bits = HasHighBits<File> ? 5 : Affine<File> || Symmetric<File> ? 4 : 8;
    // The code of weight zero, in the formats without a minimum.
    static constexpr int zero_code = has_minimum ? 0 : 1 << (bits - 1);
    static constexpr int minima = 2 * group_rows;
    static constexpr int fifth_bits = has_minimum ? 2 * minima : minima;
    static constexpr int codes = fifth_bits + (bits == 5 ? 4 * group_rows : 0);
    static constexpr int bytes = codes + group_rows * block_columns * (bits == 8 ? 8 : 4) / 8;
    static constexpr int chunks = 8;  // of four columns
};

template <>
struct BlockLayout<BlockTQ2_0> {
    using File = BlockTQ2_0;
    static constexpr int columns = ternary_columns;
    static constexpr bool has_minimum = false;
    static constexpr int bits = 2;
    static constexpr int zero_code = 1;
    static constexpr int codes = 2 * group_rows;
    static constexpr int bytes = codes + group_rows * ternary_columns / 4;
};

static_assert(BlockLayout<BlockQ4_0>::bytes == 288);
static_assert(BlockLayout<BlockQ4_1>::bytes == 320);
static_assert(BlockLayout<BlockQ5_0>::bytes == 352);
static_assert(BlockLayout<BlockQ5_1>::bytes == 384);
static_assert(BlockLayout<BlockQ8_0>::bytes == 544);
static_assert(BlockLayout<BlockTQ2_0>::bytes == 1056);

// Bytes of a group of sixteen rows.
std::int64_t group_bytes(WeightType type, std::int64_t columns);

// Puts `rows` rows, in the file's layout and without gaps, at places first_row, first_row + 1 ... of the groups that
// start at `storage`. Touches no other rows' bytes.
void interleave(WeightType type, std::int64_t columns, std::int64_t first_row, std::int64_t rows,
                const std::uint8_t* file_rows, std::uint8_t* storage);

}  // namespace quantlab::engine
