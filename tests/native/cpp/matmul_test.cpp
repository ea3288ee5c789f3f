// Every kernel against the formula of packed_matrix.h, written down once more from the file's bytes: equal bits.
#include "check.h"
#include "weight_rows.h"

#include "../../../quantlab/native/src/engine/matmul_kernel.h"
#include "../../../quantlab/native/src/instruction_set.h"

#include <cmath>
#include <cstring>
#include <vector>

using namespace quantlab;
using namespace quantlab::engine;

namespace {

struct Activations {
    std::vector<float> values, scales, sums;
    std::vector<std::int8_t> codes;

    Tokens tokens(int count, int columns, bool with_codes) const {
        return {count, columns, values.data(), with_codes ? codes.data() : nullptr, scales.data(), sums.data()};
    }
};

Activations activations(int count, int columns, Random& random) {
    Activations x;
    const auto size = static_cast<std::size_t>(count * columns);
    const std::size_t blocks = size / block_columns;
    x.values.resize(size);
    for (float& value : x.values) {
        value = random.real() * std::ldexp(1.0f, random.below(8) - 4);
    }
    x.codes.resize(size);
    x.scales.resize(blocks);
    x.sums.resize(blocks);
    for (int t = 0; t < count && columns % block_columns == 0; ++t) {
        const int block = t * (columns / block_columns);
        quantize_token(x.values.data() + t * columns, columns, x.codes.data() + t * columns, x.scales.data() + block,
                       x.sums.data() + block);
    }
    return x;
}

float expected(const Row& row, const Tokens& x, int token) {
    const int blocks = x.columns / block_columns;
    float sum = 0.0f;
    if (x.codes == nullptr || row.codes.empty()) {
        for (int i = 0; i < x.columns; ++i) {
            sum = std::fma(row.weights[static_cast<std::size_t>(i)], x.values[token * x.columns + i], sum);
        }
        return sum;
    }
    for (int b = 0; b < blocks; ++b) {
        int dot = 0;
        for (int i = b * block_columns; i < (b + 1) * block_columns; ++i) {
            dot += row.codes[static_cast<std::size_t>(i)] * x.codes[token * x.columns + i];
        }
        const auto at = static_cast<std::size_t>(b);
        sum = std::fma(static_cast<float>(dot), row.scales[at] * x.scales[token * blocks + b], sum);
        sum = std::fma(row.minima[at], x.sums[token * blocks + b], sum);
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
        check_product(matrix, rows, x.tokens(count, columns, false), random);
        if (is_quantized(type)) {
            check_product(matrix, rows, x.tokens(count, columns, true), random);
        }
    }
}

// The largest sums there are: all codes at their ends.
void test_extremes(const Variant& variant, WeightType type, std::uint8_t byte, std::int8_t code) {
    const int columns = 2 * block_columns;
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(16 * file_row_bytes(type, columns)), byte);
    const auto block_bytes = static_cast<std::size_t>(file_row_bytes(type, block_columns));
    const std::uint16_t one = half_from_float(1.0f);
    for (std::size_t at = 0; at < bytes.size(); at += block_bytes) {
        std::memcpy(bytes.data() + at, &one, 2);
        if (type == WeightType::q4_1 || type == WeightType::q5_1) {
            std::memcpy(bytes.data() + at + 2, &one, 2);
        }
    }
    Random random(1);
    const PackedMatrix matrix = packed(variant, type, 16, columns, bytes, random);
    const std::vector<Row> rows(16, read_row(type, bytes.data(), columns));
    for (const int count : {1, 3, 9}) {
        Activations x = activations(count, columns, random);
        x.codes.assign(x.codes.size(), code);
        check_product(matrix, rows, x.tokens(count, columns, true), random);
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

}  // namespace

void test_matmul() {
    for (const Variant& variant : variants()) {
        std::printf("multiplications: %s\n", variant.set);
        Random random(3);
        test_quantize_token(variant);
        for (const WeightType type : weight_types) {
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
