// Low-rank updates of a decoder's matrices, y = W x + B A x, computed beside them from the float activations x.
//
// Matrices that read one input have their A stacked, so that the input is read once: each matrix's B takes a run of the
// products. Every rounding is given, as for weights (packed_matrix.h), so that the bits depend on nothing else:
//
//   product = the sum of 16 lanes, folded (lanes.h); lane = fma(a, x, lane) from 0, over the columns i, i + 16 ...
//   update = fma(b, product, update) from 0, over the ranks in ascending order; y = y + update
#pragma once

#include <vector>

namespace quantlab::engine {

inline constexpr int most_adapter_rank = 1 << 16;  // of an input

// The A of the matrices that read one input.
struct LowRankInput {
    int rank = 0;          // 0 for none
    std::vector<float> a;  // [rank][columns]
};

// The B of a matrix, scale included.
struct LowRankRows {
    int first = 0, rank = 0;  // which of the input's products it takes; rank 0 for none
    std::vector<float> b;     // [rows / 16][rank][16]
};

struct LayerAdapters {
    LowRankInput attention, output, inner, down;  // of query, key and value; of output; of gate and up; of down
    LowRankRows query_rows, key_rows, value_rows, output_rows, gate_rows, up_rows, down_rows;
};

}  // namespace quantlab::engine
