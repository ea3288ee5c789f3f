// Rows of weights in the file's layout, random ones, and what they mean: the formats written down once more.
#pragma once

#include "check.h"

#include "../../../quantlab/native/src/blocks.h"
#include "../../../quantlab/native/src/engine/packed_matrix.h"
#include "../../../quantlab/native/src/numbers.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace weight_rows {

using namespace quantlab;
using namespace quantlab::engine;

// Those of blocks of 32 columns before that of 256.
inline constexpr WeightType weight_types[] = {WeightType::f32,  WeightType::f16,  WeightType::bf16,
                                              WeightType::q4_0, WeightType::q4_1, WeightType::q5_0,
                                              WeightType::q5_1, WeightType::q8_0, WeightType::tq2_0};

// Bytes of any kind but for scales and minima, which are halves of moderate size.
inline std::vector<std::uint8_t> random_rows(WeightType type, std::int64_t rows, std::int64_t columns, Random& random) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(rows * file_row_bytes(type, columns)));
    for (std::uint8_t& byte : bytes) {
        byte = static_cast<std::uint8_t>(random.bits());
    }
    const auto set_half = [&](std::size_t at) {
        const std::uint16_t half = half_from_float(random.real() * 0.1f);
        std::memcpy(bytes.data() + at, &half, 2);
    };
    if (!is_quantized(type)) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(rows * columns); ++i) {
            const float value = random.real();
            if (type == WeightType::f32) {
                std::memcpy(bytes.data() + 4 * i, &value, 4);
            } else {
                const std::uint16_t half = type == WeightType::f16 ? half_from_float(value) : brain_from_float(value);
                std::memcpy(bytes.data() + 2 * i, &half, 2);
            }
        }
        return bytes;
    }
    const auto block_bytes = static_cast<std::size_t>(file_row_bytes(type, columns_unit(type)));
    for (std::size_t at = 0; at < bytes.size(); at += block_bytes) {
        set_half(type == WeightType::tq2_0 ? at + offsetof(BlockTQ2_0, scale) : at);
        if (type == WeightType::q4_1 || type == WeightType::q5_1) {
            set_half(at + 2);
        }
    }
    return bytes;
}

// One row, taken apart: what the formula is about.
struct Row {
    std::vector<float> weights;
    std::vector<float> scales, minima;  // of its blocks; no minima where they are of 256 columns
    std::vector<int> codes;
};

template <typename File>
int code_of(const File& file, int i) {
    if constexpr (sizeof(File) == sizeof(BlockQ8_0)) {
        return file.codes[i] + 128;
    } else {
        int code = i < 16 ? file.nibbles[i] & 15 : file.nibbles[i - 16] >> 4;
        if constexpr (HasHighBits<File>) {
            code += (file.high_bits[i / 8] >> (i % 8) & 1) * 16;
        }
        return code;
    }
}

template <typename File>
void read_blocks(const std::uint8_t* bytes, std::int64_t columns, float zero_code, Row& row) {
    for (std::int64_t b = 0; b < columns / block_columns; ++b) {
        File file;
        std::memcpy(&file, bytes + b * static_cast<std::int64_t>(sizeof file), sizeof file);
        const float scale = float_from_half(file.scale);
        row.scales.push_back(scale);
        if constexpr (Affine<File>) {
            row.minima.push_back(float_from_half(file.minimum));
        } else {
            row.minima.push_back(-zero_code * scale);
        }
        for (int i = 0; i < block_columns; ++i) {
            const int code = code_of(file, i);
            row.codes.push_back(code);
            const float step = scale * (static_cast<float>(code) - zero_code);
            row.weights.push_back(Affine<File> ? step + row.minima.back() : step);
        }
    }
}

// Codes less 1, so that they are the weights of scale 1.
inline void read_ternary(const std::uint8_t* bytes, std::int64_t columns, Row& row) {
    for (std::int64_t i = 0; i < columns; ++i) {
        BlockTQ2_0 file;
        std::memcpy(&file, bytes + i / 256 * static_cast<std::int64_t>(sizeof file), sizeof file);
        const std::int64_t half = i % 256 / 128, plane = i % 128 / 32, byte = 32 * half + i % 32;
        row.codes.push_back((file.codes[byte] >> 2 * plane & 3) - 1);
        if (i % 256 == 0) row.scales.push_back(float_from_half(file.scale));
        row.weights.push_back(row.scales.back() * static_cast<float>(row.codes.back()));
    }
}

inline Row read_row(WeightType type, const std::uint8_t* bytes, std::int64_t columns) {
    Row row;
    switch (type) {
        case WeightType::q4_0:
            read_blocks<BlockQ4_0>(bytes, columns, 8, row);
            break;
        case WeightType::q4_1:
            read_blocks<BlockQ4_1>(bytes, columns, 0, row);
            break;
        case WeightType::q5_0:
            read_blocks<BlockQ5_0>(bytes, columns, 16, row);
            break;
        case WeightType::q5_1:
            read_blocks<BlockQ5_1>(bytes, columns, 0, row);
            break;
        case WeightType::q8_0:
            read_blocks<BlockQ8_0>(bytes, columns, 128, row);
            break;
        case WeightType::tq2_0:
            read_ternary(bytes, columns, row);
            break;
        default:
            for (std::int64_t i = 0; i < columns; ++i) {
                row.weights.push_back(type == WeightType::f32   ? load_element<Element::f32>(bytes + 4 * i)
                                      : type == WeightType::f16 ? load_element<Element::f16>(bytes + 2 * i)
                                                                : load_element<Element::bf16>(bytes + 2 * i));
            }
    }
    return row;
}

}  // namespace weight_rows

using weight_rows::random_rows;
using weight_rows::read_row;
using weight_rows::Row;
using weight_rows::weight_types;
