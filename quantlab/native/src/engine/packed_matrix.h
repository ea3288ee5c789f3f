// A weight matrix in memory as the engine multiplies by it: sixteen rows interleaved, a vector lane for each.
//
// The multiplication, for output (token, row), is a formula whose every rounding is given, so that all instruction sets,
// numbers of threads and numbers of tokens a call give the same bits. A quantized weight is d * code + m, with d and m
// of its block of 32 columns; the formats without a minimum have m = -8 d, -16 d, -128 d (q8_0's signed code is stored
// plus 128). tq2_0's weight is d * (code - 1), in blocks of 256 columns. From acc = 0, over the blocks in ascending order:
//
//   with int8 activations    acc = fma(float(sum of code * activation code), d * scale, acc); acc = fma(m, sum, acc)
//   tq2_0                    acc = fma(float(sum of (code - 1) * activation code), d * scale, acc)
//   with float activations   acc = fma(weight, value, acc), over the columns in ascending order
//
// The sum of products is an exact integer below 2^24; `weight` is decoded as the format defines it (kernels.h); `scale`
// and `sum` are those of CodedTokens. Weights in f32, f16 and bf16 are always multiplied by float activations.
#pragma once

#include "storage.h"

#include <cstdint>

namespace quantlab::engine {

enum class WeightType : int { f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, tq2_0 };

inline constexpr int weight_type_count = 9;
inline constexpr int block_columns = 32;
inline constexpr int ternary_columns = 256;  // of a block of tq2_0
inline constexpr int group_rows = 16;

constexpr bool is_quantized(WeightType type) { return type >= WeightType::q4_0; }

// What the columns of a matrix must be a multiple of.
constexpr int columns_unit(WeightType type) {
    return !is_quantized(type) ? 1 : type == WeightType::tq2_0 ? ternary_columns : block_columns;
}

// What has one scale when activations are rounded to int8: each run of 32 columns of a token, or the whole token.
enum class ActivationScheme : int { block, token };

constexpr ActivationScheme activation_scheme(WeightType type) {
    return type == WeightType::tq2_0 ? ActivationScheme::token : ActivationScheme::block;
}

// Bytes of `columns` weights as files (GGUF) hold them.
std::int64_t file_row_bytes(WeightType type, std::int64_t columns);

// How many scales and sums CodedTokens has of each token.
constexpr int scales_per_token(ActivationScheme scheme, int columns) {
    return scheme == ActivationScheme::token ? 1 : columns / block_columns;
}
constexpr int sums_per_token(ActivationScheme scheme, int columns) {
    return columns / (scheme == ActivationScheme::token ? ternary_columns : block_columns);
}

// Activations in int8, row-major and contiguous, as quantize_token (by block) or quantize_row (by token) leaves them.
struct CodedTokens {
    const std::int8_t* codes = nullptr;  // [count][columns], -127 to 127; null where there are none
    const float* scales = nullptr;       // by block [count][columns / 32]; by token [count]
    // By block [count][columns / 32]: scale * (sum of the block's codes), rounded once.
    // By token [count][columns / 256]: the sum of the codes that meet a block of weights.
    const float* sums = nullptr;
};

// Activations as multiplications read them: row-major, contiguous. Weights are multiplied by the codes of their type's
// scheme, or by the values where there are no such codes. `columns` is a multiple of columns_unit(type). Fast if aligned
// to 64 bytes.
struct Tokens {
    int count;
    int columns;
    const float* values;  // [count][columns]; not read where codes are
    CodedTokens by_block = {};
    CodedTokens by_token = {};

    const CodedTokens& coded(ActivationScheme scheme) const {
        return scheme == ActivationScheme::token ? by_token : by_block;
    }
};

// One token's activations in int8, in blocks of 32: scale = max|x| / 127, code = x * (1 / scale) to the nearest whole
// number, ties to even, sum as in Tokens. A block of zeros, or of numbers so small that 1 / scale is beyond fp32, has
// codes and sum 0; one with NaN or infinity has codes 0 and scale and sum NaN. `columns` is a multiple of 32.
//
// Looks up the instruction set on every call; in a loop take matmul_kernel() once (matmul_kernel.h).
void quantize_token(const float* values, int columns, std::int8_t* codes, float* scales, float* sums);

// The same with one scale for the row, the largest magnitude of all its columns / 127, and sums of 256 codes each. A row
// with NaN or infinity anywhere has codes and sums 0 and scale NaN. `columns` is a multiple of 256.
void quantize_row(const float* values, int columns, std::int8_t* codes, float* scale, float* sums);

struct MatmulKernel;

class PackedMatrix {
public:
    // All weights zero. `rows` and `columns` at least 1, columns a multiple of columns_unit(type). The kernel is the
    // chosen instruction set's unless given. Throws std::bad_alloc.
    PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns);
    PackedMatrix(WeightType type, std::int64_t rows, std::int64_t columns, const MatmulKernel& kernel);
    PackedMatrix(PackedMatrix&&) noexcept = default;
    PackedMatrix& operator=(PackedMatrix&&) noexcept = default;
    ~PackedMatrix() = default;

    // Takes `rows` rows from `first_row` on, in the file's layout and without gaps. Different threads may fill
    // different rows at the same time.
    void fill(std::int64_t first_row, std::int64_t rows, const std::uint8_t* file_rows);

    WeightType type() const { return type_; }
    std::int64_t rows() const { return rows_; }
    std::int64_t columns() const { return columns_; }
    int groups() const { return static_cast<int>((rows_ + group_rows - 1) / group_rows); }
    std::int64_t group_bytes() const;  // what a multiplication reads of each group

    // Writes out[t * out_stride + row] for the rows of groups first_group to last_group - 1, and nothing else. Threads
    // share a multiplication by taking different groups. Needs fp32's default environment: see ThreadPool::run.
    void multiply(const Tokens& x, float* out, std::int64_t out_stride, int first_group, int last_group) const;

    // The weights of one row, decoded.
    void read_row(std::int64_t row, float* out) const;

private:
    WeightType type_;
    std::int64_t rows_;
    std::int64_t columns_;
    const MatmulKernel* kernel_;
    Storage storage_;
};

}  // namespace quantlab::engine
