// The inner loops of multiplications, one table per instruction set; all give the bits packed_matrix.h states.
#pragma once

#include "packed_matrix.h"

#include <cstdint>

namespace quantlab::engine {

// Groups first_group to last_group - 1 of a matrix, whose storage of `rows` rows starts at `storage`.
struct Multiplication {
    const std::uint8_t* storage;
    std::int64_t rows;
    Tokens tokens;
    float* out;
    std::int64_t out_stride;
    int first_group;
    int last_group;
};

struct MatmulKernel {
    using Multiply = void (*)(const Multiplication& job);
    using QuantizeToken = void (*)(const float* values, int columns, std::int8_t* codes, float* scales, float* sums);

    Multiply by_values[weight_type_count];
    Multiply by_codes[weight_type_count];  // null for float types
    QuantizeToken quantize_token;
    QuantizeToken quantize_row;

    QuantizeToken quantizer(ActivationScheme scheme) const {
        return scheme == ActivationScheme::token ? quantize_row : quantize_token;
    }
};

const MatmulKernel& scalar_matmul_kernel();

// Null where this build has none.
const MatmulKernel* avx2_matmul_kernel();
const MatmulKernel* avx_vnni_matmul_kernel();
const MatmulKernel* avx512_matmul_kernel();

// That of the chosen instruction set (instruction_set.h), which must be one.
const MatmulKernel& matmul_kernel();

}  // namespace quantlab::engine
