// Every kernel against the formula of packed_matrix.h, written down once more from the file's bytes: equal bits.
#include "check.h"
#include "weight_rows.h"

#include "../../../quantlab/native/src/engine/matmul_kernel.h"
#include "../../../quantlab/native/src/instruction_set.h"

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

using namespace quantlab;
using namespace quantlab::engine;

namespace {

struct Coded {
    std::vector<std::int8_t> codes;
    std::vector<float> scales, sums;

    Coded(int count, int columns, ActivationScheme scheme)
        : codes(static_cast<std::size_t>(count * columns)),
          scales(static_cast<std::size_t>(count * scales_per_token(scheme, columns))),
          sums(static_cast<std::size_t>(count * sums_per_token(scheme, columns))) {}

    CodedTokens all() const { return {codes.data(), scales.data(), sums.data()}; }
};

struct Activations {
    std::vector<float> values;
    Coded by_block, by_token;

    Tokens tokens(int count, int columns) const { return {count, columns, values.data()}; }
    Tokens tokens(int count, int columns, ActivationScheme scheme) const {
        Tokens tokens{count, columns, values.data()};
        (scheme == ActivationScheme::token ? tokens.by_token = by_token.all() : tokens.by_block = by_block.all());
        return tokens;
    }
};

Activations activations(int count, int columns, Random& random) {
    Activations x{std::vector<float>(static_cast<std::size_t>(count * columns)),
                  Coded(count, columns, ActivationScheme::block), Coded(count, columns, ActivationScheme::token)};
    for (float& value : x.values) {
        value = random.real() * std::ldexp(1.0f, random.below(8) - 4);
    }
    for (int t = 0; t < count; ++t) {
        const float* values = x.values.data() + t * columns;
        const int block = t * (columns / block_columns), wide = t * (columns / ternary_columns);
        if (columns % block_columns == 0) {
            Coded& to = x.by_block;
            quantize_token(values, columns, to.codes.data() + t * columns, to.scales.data() + block, to.sums.data() + block);
        }
        if (columns % ternary_columns == 0) {
            Coded& to = x.by_token;
            quantize_row(values, columns, to.codes.data() + t * columns, to.scales.data() + t, to.sums.data() + wide);
        }
    }
    return x;
}

float expected_of_values(const Row& row, const Tokens& x, int token) {
    float sum = 0.0f;
    for (int i = 0; i < x.columns; ++i) {
        sum = std::fma(row.weights[static_cast<std::size_t>(i)], x.values[token * x.columns + i], sum);
    }
    return sum;
}

int dot_of_codes(const Row& row, const std::int8_t* codes, int first, int last) {
    int dot = 0;
    for (int i = first; i < last; ++i) {
        dot += row.codes[static_cast<std::size_t>(i)] * codes[i];
    }
    return dot;
}

float expected(const Row& row, const Tokens& x, int token) {
    const bool is_ternary = !row.codes.empty() && row.minima.empty();
    const CodedTokens& coded = is_ternary ? x.by_token : x.by_block;
    if (coded.codes == nullptr || row.codes.empty()) {
        return expected_of_values(row, x, token);
    }
    const int unit = is_ternary ? ternary_columns : block_columns, blocks = x.columns / unit;
    const std::int8_t* codes = coded.codes + token * x.columns;
    float sum = 0.0f;
    for (int b = 0; b < blocks; ++b) {
        const auto dot = static_cast<float>(dot_of_codes(row, codes, b * unit, (b + 1) * unit));
        const auto at = static_cast<std::size_t>(b);
        if (is_ternary) {
            sum = std::fma(dot, row.scales[at] * coded.scales[token], sum);
        } else {
            sum = std::fma(dot, row.scales[at] * coded.scales[token * blocks + b], sum);
            sum = std::fma(row.minima[at], coded.sums[token * blocks + b], sum);
        }
    }
    return sum;
}

struct Variant {
    const char* set;
    const MatmulKernel* kernel;
};

// Those that can run here.
std::vector<Variant> variants() {
    std::vector<Variant> found{{"scalar", &scalar_matmul_kernel()}};
    if (can_run(InstructionSet::avx2) && avx2_matmul_kernel() != nullptr) {
        found.push_back({"avx2", avx2_matmul_kernel()});
    }
    if (has_avx_vnni() && avx_vnni_matmul_kernel() != nullptr) {
        found.push_back({"avx_vnni", avx_vnni_matmul_kernel()});
    }
    if (can_run(InstructionSet::avx512) && avx512_matmul_kernel() != nullptr) {
        found.push_back({"avx512", avx512_matmul_kernel()});
    }
    return found;
}

constexpr float untouched = 12345.0f;

// Multiplies in random ranges of groups, leaving one out: it must stay as it is, like all that lies between the rows.
void check_product(const PackedMatrix& matrix, const std::vector<Row>& rows, const Tokens& x, Random& random) {
    const std::int64_t stride = matrix.rows() + random.below(3);
    std::vector<float> out(static_cast<std::size_t>(x.count * stride), untouched);
    const int left_out = matrix.groups() > 1 ? random.below(matrix.groups()) : -1;
    for (int group = 0; group < matrix.groups();) {
        if (group == left_out) {
            ++group;
            continue;
        }
        const int end = group < left_out ? left_out : matrix.groups();
        const int last = group + 1 + random.below(end - group);
        matrix.multiply(x, out.data(), stride, group, last);
        group = last;
    }
    for (int t = 0; t < x.count; ++t) {
        for (std::int64_t r = 0; r < stride; ++r) {
            const float found = out[static_cast<std::size_t>(t * stride + r)];
            if (r >= matrix.rows() || r / group_rows == left_out) {
                CHECK(found == untouched);
            } else {
                CHECK(same_bits(found, expected(rows[static_cast<std::size_t>(r)], x, t)));
            }
        }
    }
}

PackedMatrix packed(const Variant& variant, WeightType type, std::int64_t row_count, std::int64_t columns,
                    const std::vector<std::uint8_t>& bytes, Random& random) {
    PackedMatrix matrix(type, row_count, columns, *variant.kernel);
    for (std::int64_t first = 0; first < row_count;) {
        const std::int64_t count = 1 + random.below(static_cast<int>(row_count - first));
        matrix.fill(first, count, bytes.data() + first * file_row_bytes(type, columns));
        first += count;
    }
    return matrix;
}

void test_matrix(const Variant& variant, WeightType type, int row_count, int columns, const std::vector<int>& token_counts, Random& random) {
    const std::vector<std::uint8_t> bytes = random_rows(type, row_count, columns, random);
    const PackedMatrix matrix = packed(variant, type, row_count, columns, bytes, random);
    std::vector<Row> rows;
    std::vector<float> decoded(static_cast<std::size_t>(columns));
    for (int r = 0; r < row_count; ++r) {
        rows.push_back(read_row(type, bytes.data() + r * file_row_bytes(type, columns), columns));
        matrix.read_row(r, decoded.data());
        CHECK(decoded == rows.back().weights);
    }
    for (const int count : token_counts) {
        const Activations x = activations(count, columns, random);
        check_product(matrix, rows, x.tokens(count, columns), random);
        if (is_quantized(type)) {
            check_product(matrix, rows, x.tokens(count, columns, ActivationScheme::block), random);
            check_product(matrix, rows, x.tokens(count, columns, ActivationScheme::token), random);
        }
    }
}

// The largest sums there are: all codes at their ends.
void test_extremes(const Variant& variant, WeightType type, std::uint8_t byte, std::int8_t code) {
    const int columns = 2 * columns_unit(type);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(16 * file_row_bytes(type, columns)), byte);
    const auto block_bytes = static_cast<std::size_t>(file_row_bytes(type, columns_unit(type)));
    const std::size_t scale_at = type == WeightType::tq2_0 ? offsetof(BlockTQ2_0, scale) : 0;
    const std::uint16_t one = half_from_float(1.0f);
    for (std::size_t at = 0; at < bytes.size(); at += block_bytes) {
        std::memcpy(bytes.data() + at + scale_at, &one, 2);
        if (type == WeightType::q4_1 || type == WeightType::q5_1) {
            std::memcpy(bytes.data() + at + 2, &one, 2);
        }
    }
    Random random(1);
    const PackedMatrix matrix = packed(variant, type, 16, columns, bytes, random);
    const std::vector<Row> rows(16, read_row(type, bytes.data(), columns));
    for (const int count : {1, 3, 9}) {
        Activations x = activations(count, columns, random);
        x.by_block.codes.assign(x.by_block.codes.size(), code);
        x.by_token.codes = x.by_block.codes;
        x.by_token.sums.assign(x.by_token.sums.size(), static_cast<float>(ternary_columns * code));
        check_product(matrix, rows, x.tokens(count, columns, activation_scheme(type)), random);
    }
}

void test_quantize_token(const Variant& variant) {
    Random random(5);
    constexpr int columns = 64 * block_columns;
    std::vector<float> values(columns);
    for (int i = 0; i < columns; ++i) {
        values[static_cast<std::size_t>(i)] = random.real() * std::ldexp(1.0f, i / block_columns * 5 - 160);
    }
    values[32 * 40 + 3] = NAN;
    values[32 * 41 + 31] = -INFINITY;
    std::vector<std::int8_t> codes(columns);
    std::vector<float> scales(columns / 32), sums(columns / 32);
    variant.kernel->quantize_token(values.data(), columns, codes.data(), scales.data(), sums.data());
    for (int b = 0; b < columns / block_columns; ++b) {
        float largest = 0.0f;
        bool is_finite = true;
        for (int i = 32 * b; i < 32 * b + 32; ++i) {
            largest = std::fmax(largest, std::fabs(values[static_cast<std::size_t>(i)]));
            is_finite = is_finite && std::isfinite(values[static_cast<std::size_t>(i)]);
        }
        const float scale = largest / 127.0f;
        const float inverse = std::isinf(1.0f / scale) ? 0.0f : 1.0f / scale;
        int sum = 0;
        for (int i = 32 * b; i < 32 * b + 32; ++i) {
            const int code =
                is_finite ? static_cast<int>(std::nearbyint(values[static_cast<std::size_t>(i)] * inverse)) : 0;
            CHECK(codes[static_cast<std::size_t>(i)] == code);
            sum += code;
        }
        CHECK(same_bits(scales[static_cast<std::size_t>(b)], is_finite ? scale : NAN));
        CHECK(same_bits(sums[static_cast<std::size_t>(b)], is_finite ? scale * static_cast<float>(sum) : NAN));
    }
}

void test_ternary(const Variant& variant, Random& random) {
    test_matrix(variant, WeightType::tq2_0, 33, 512, {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33}, random);
    test_matrix(variant, WeightType::tq2_0, 1, 256, {1, 2, 5}, random);
    test_matrix(variant, WeightType::tq2_0, 15, 1280, {1, 4, 13}, random);
    test_matrix(variant, WeightType::tq2_0, 80, 256, {1, 2, 259}, random);
    for (const int byte : {0x00, 0x55, 0xaa, 0xff}) {  // all of one code, the last of which no weight is to have
        test_extremes(variant, WeightType::tq2_0, static_cast<std::uint8_t>(byte), 127);
        test_extremes(variant, WeightType::tq2_0, static_cast<std::uint8_t>(byte), -127);
    }
}

// Magnitudes from far below an inverse to far above, then NaN and infinity at either end.
void test_quantize_row(const Variant& variant) {
    Random random(5);
    constexpr int columns = 3 * ternary_columns;
    for (int exponent = -170; exponent < 127; exponent += 9) {
        for (const float spoilt : {0.0f, NAN, INFINITY, -INFINITY}) {
            std::vector<float> values(columns);
            for (float& value : values) {
                value = random.real() * std::ldexp(1.0f, exponent - random.below(4));
            }
            if (spoilt != 0.0f) {
                values[random.below(2) == 0 ? 0 : columns - 1] = spoilt;
            }
            float largest = 0.0f;
            for (const float value : values) {
                largest = std::fmax(largest, std::fabs(value));
            }
            const float scale = largest / 127.0f, inverse = std::isinf(1.0f / scale) ? 0.0f : 1.0f / scale;
            std::vector<std::int8_t> codes(columns);
            float found = 0.0f, sums[columns / ternary_columns];
            variant.kernel->quantize_row(values.data(), columns, codes.data(), &found, sums);
            CHECK(same_bits(found, spoilt == 0.0f ? scale : NAN));
            for (int b = 0; b < columns / ternary_columns; ++b) {
                int sum = 0;
                for (int i = b * ternary_columns; i < (b + 1) * ternary_columns; ++i) {
                    const auto at = static_cast<std::size_t>(i);
                    CHECK(codes[at] == (spoilt == 0.0f ? static_cast<int>(std::nearbyint(values[at] * inverse)) : 0));
                    sum += codes[at];
                }
                CHECK(sums[b] == static_cast<float>(sum));
            }
        }
    }
}

}  // namespace

void test_matmul() {
    for (const Variant& variant : variants()) {
        std::printf("multiplications: %s\n", variant.set);
        Random random(3);
        test_quantize_token(variant);
        test_quantize_row(variant);
        for (const WeightType type : weight_types) {
            if (type == WeightType::tq2_0) {
                test_ternary(variant, random);
                continue;
            }
            test_matrix(variant, type, 33, 64, {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 33}, random);
            test_matrix(variant, type, 1, 32, {1, 2, 5}, random);
            test_matrix(variant, type, 15, 1152, {1, 4, 13}, random);
            test_matrix(variant, type, 80, 96, {1, 2, 259}, random);
            if (!is_quantized(type)) {
                test_matrix(variant, type, 17, 301, {1, 2, 9}, random);
                test_matrix(variant, type, 2, 1, {1, 2}, random);
            } else {
                for (const int byte : {0x00, 0x7f, 0x80, 0xff}) {
                    test_extremes(variant, type, static_cast<std::uint8_t>(byte), 127);
                    test_extremes(variant, type, static_cast<std::uint8_t>(byte), -127);
                }
            }
        }
    }
}
