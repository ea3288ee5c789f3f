// Low-rank updates of blocks: exact buffers, any bytes and any finite update, every format and kernel, several threads.
#include "check.h"

#include "../../../quantlab/native/src/adapters/updates.h"
#include "../../../quantlab/native/src/instruction_set.h"
#include "../../../quantlab/native/src/numbers.h"

#include <cmath>
#include <cstddef>
#include <optional>
#include <vector>

using namespace quantlab;
using namespace quantlab::adapters;

namespace {

constexpr float extremes[] = {0.0f, -0.0f, 0x1p-149f, -0x1p-130f, 1e30f, -3e38f, 0x1p-24f, 0.5f};

std::vector<float> floats(std::int64_t count, bool extreme, Random& random) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& value : values) {
        value = extreme && random.below(3) == 0 ? extremes[random.below(8)] : random.real();
    }
    return values;
}

std::vector<std::uint8_t> bytes(std::int64_t count, Random& random) {
    std::vector<std::uint8_t> values(static_cast<std::size_t>(count));
    for (std::uint8_t& value : values) {
        value = static_cast<std::uint8_t>(random.bits());
    }
    return values;
}

// One element as the kernels' specification says it.
float element(const LowRank& update, std::int64_t row, std::int64_t column) {
    float sum = 0.0f;
    for (std::int64_t k = 0; k < update.rank; ++k) {
        const float product = update.b[row * update.rank + k] * update.a[k * update.columns + column];
        sum = sum + product;
    }
    return sum * update.scale;
}

void test_product(const UpdateKernel& kernel, const LowRank& update) {
    const auto found = first_not_finite(kernel, update, 3);
    std::optional<Position> expected;
    std::vector<float> out(static_cast<std::size_t>(update.rows * update.columns), -1.0f);
    multiply(kernel, update, 2, out.data());
    for (std::int64_t row = 0; row < update.rows; ++row) {
        for (std::int64_t column = 0; column < update.columns; ++column) {
            const float value = element(update, row, column);
            CHECK(same_bits(out[static_cast<std::size_t>(row * update.columns + column)], value));
            if (!expected && !std::isfinite(value)) {
                expected = Position{row, column};
            }
        }
    }
    CHECK(found.has_value() == expected.has_value());
    CHECK(!found || (found->row == expected->row && found->index == expected->index));
}

void test_codes(const UpdateKernel& kernel, const BlockFormat& format, std::int64_t rows, std::int64_t blocks, bool extreme,
                Random& random) {
    const std::int64_t columns = blocks * weights_per_block, size = rows * blocks * format.block_bytes;
    const auto a = floats(rows * columns, extreme, random);
    std::vector<float> b(static_cast<std::size_t>(rows * rows));  // the unit matrix: `a` is the update
    for (std::int64_t i = 0; i < rows; ++i) {
        b[static_cast<std::size_t>(i * rows + i)] = 1.0f;
    }
    const LowRank update{a.data(), b.data(), 1.0f, rows, columns, rows};
    const LowRank none{a.data(), b.data(), 0.0f, rows, columns, rows};
    const auto before = bytes(size, random);
    for (std::int32_t levels = format.fewest_levels; levels <= format.most_levels; levels += 1 + random.below(40)) {
        std::vector<std::uint8_t> after(before.size()), by_scalar(before.size()), same = before;
        rechoose_codes(kernel, format, levels, update, 2, before.data(), after.data());
        rechoose_codes(scalar_updates(), format, levels, update, 1, before.data(), by_scalar.data());
        rechoose_codes(kernel, format, levels, none, 3, same.data(), same.data());
        CHECK(after == by_scalar);
        CHECK(same == before);
    }
}

void test_kernel(const UpdateKernel& kernel) {
    Random random(5);
    for (const std::int64_t rows : {0, 1, 3, 65, 130}) {
        for (const std::int64_t columns : {0, 1, 31, 64, 77}) {
            for (const std::int64_t rank : {0, 1, 5}) {
                for (const bool extreme : {false, true}) {
                    const auto a = floats(rank * columns, extreme, random), b = floats(rows * rank, extreme, random);
                    test_product(kernel, {a.data(), b.data(), random.real(), rows, columns, rank});
                }
            }
        }
    }
    for (const BlockFormat& format : block_formats()) {
        if (!format.has_own_scales()) continue;  // no update can be had block by block
        for (const bool extreme : {false, true}) {
            test_codes(kernel, format, 1, 1, extreme, random);
            test_codes(kernel, format, 67, 2, extreme, random);
        }
    }
}

}  // namespace

void test_updates() {
    test_kernel(scalar_updates());
    if (avx2_updates() != nullptr) {
        test_kernel(*avx2_updates());
    }
}
