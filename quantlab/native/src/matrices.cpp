#include "matrices.h"

#include "threads.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace quantlab {

namespace {

// A thread takes some 20 to 50 microseconds to start, in which a kernel converts about this many weights.
constexpr std::int64_t fewest_weights_per_part = 1 << 16;
constexpr std::int64_t parts_per_thread = 8;

// How many parts to cut the rows into, and how many threads have work then.
struct Split {
    int parts;
    int threads;
};

Split split(MatrixShape shape, int threads) {
    const std::int64_t useful_parts = std::min(shape.rows, shape.rows * shape.columns / fewest_weights_per_part);
    const std::int64_t useful_threads = std::clamp<std::int64_t>(useful_parts, 1, threads);
    const std::int64_t wanted_parts = useful_threads == 1 ? 1 : useful_threads * parts_per_thread;
    const std::int64_t parts = std::clamp<std::int64_t>(useful_parts, 1, wanted_parts);
    return {static_cast<int>(parts), static_cast<int>(useful_threads)};
}

float element_at(Element element, const std::uint8_t* weights, std::int64_t index) {
    const std::uint8_t* bytes = weights + index * element_bytes(element);
    switch (element) {
        case Element::f16: return load_element<Element::f16>(bytes);
        case Element::bf16: return load_element<Element::bf16>(bytes);
        default: return load_element<Element::f32>(bytes);
    }
}

std::optional<std::int64_t> first_not_finite(Element element, const std::uint8_t* weights, std::int64_t columns) {
    for (std::int64_t column = 0; column < columns; ++column) {
        if (!std::isfinite(element_at(element, weights, column))) {
            return column;
        }
    }
    return std::nullopt;
}

// The first block with an infinite scale or minimum: blocks of weights that are not finite have scale NaN instead.
std::optional<std::int64_t> first_overflow(const BlockFormat& format, const std::uint8_t* bytes, std::int64_t blocks) {
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (std::int32_t i = 0; i < format.header_halves; ++i) {
            std::uint16_t half;
            std::memcpy(&half, bytes + block * format.block_bytes + 2 * i, sizeof half);
            if ((half & 0x7fffu) == half_infinity_bits) {
                return block;
            }
        }
    }
    return std::nullopt;
}

std::optional<Position> first_not_finite(Element element, const std::uint8_t* weights, MatrixShape shape,
                                         std::span<const double> block_sums) {
    const std::int64_t blocks = shape.columns / weights_in<BlockTQ2_0>;
    const auto bad = std::find_if_not(block_sums.begin(), block_sums.end(), [](double sum) { return std::isfinite(sum); });
    if (bad == block_sums.end()) {
        return std::nullopt;
    }
    const std::int64_t row = (bad - block_sums.begin()) / blocks;
    const std::uint8_t* source = weights + row * shape.columns * element_bytes(element);
    return Position{row, *first_not_finite(element, source, shape.columns)};
}

void fill_not_a_number(std::int64_t blocks, std::uint8_t* bytes) {
    BlockTQ2_0 block;
    std::fill_n(block.codes, sizeof block.codes, ternary_zeros);
    block.scale = half_nan_bits;
    for (std::int64_t i = 0; i < blocks; ++i) {
        std::memcpy(bytes + i * static_cast<std::int64_t>(sizeof block), &block, sizeof block);
    }
}

void note_first(std::optional<Position>& first, std::int64_t row, std::optional<std::int64_t> index) {
    if (!first && index) {
        first = Position{row, *index};
    }
}

}  // namespace

Faults quantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* weights,
                       MatrixShape shape, std::int32_t levels, int threads, std::uint8_t* bytes, RowSums* sums) {
    const QuantizeRow quantize_row = kernel.quantize[format.index][static_cast<std::int32_t>(element)];
    const std::int64_t blocks = shape.columns / format.block_weights;
    const std::int64_t weight_bytes = shape.columns * element_bytes(element);
    const std::int64_t row_bytes = blocks * format.block_bytes;
    const auto [parts, workers] = split(shape, threads);
    std::vector<Faults> found(static_cast<std::size_t>(parts));
    for_each_part(shape.rows, parts, workers, [&](int part, std::int64_t first, std::int64_t last) {
        Faults& faults = found[static_cast<std::size_t>(part)];
        for (std::int64_t row = first; row < last; ++row) {
            const std::uint8_t* source = weights + row * weight_bytes;
            std::uint8_t* target = bytes + row * row_bytes;
            if (!quantize_row(source, blocks, levels, target, sums == nullptr ? nullptr : sums + row)) {
                note_first(faults.not_finite, row, first_not_finite(element, source, shape.columns));
                note_first(faults.overflow, row, first_overflow(format, target, blocks));
            }
        }
    });
    Faults faults;
    for (const Faults& later : found) {  // parts are in the order of rows
        faults.not_finite = faults.not_finite ? faults.not_finite : later.not_finite;
        faults.overflow = faults.overflow ? faults.overflow : later.overflow;
    }
    return faults;
}

void sum_magnitudes(const Kernel& kernel, Element element, const std::uint8_t* weights, MatrixShape shape, int threads,
                    double* sums) {
    const SumMagnitudes sum = kernel.sum_magnitudes[static_cast<std::int32_t>(element)];
    const std::int64_t blocks = shape.columns / weights_in<BlockTQ2_0>;
    const auto [parts, workers] = split(shape, threads);
    for_each_part(shape.rows, parts, workers, [&](int, std::int64_t first, std::int64_t last) {
        sum(weights + first * shape.columns * element_bytes(element), (last - first) * blocks, sums + first * blocks);
    });
}

std::uint16_t ternary_scale(std::span<const double> block_sums) {
    if (block_sums.empty()) {
        return 0;
    }
    const DefaultFloatingPoint guard;
    std::vector<double> sums(block_sums.begin(), block_sums.end());
    sums.resize(std::bit_ceil(sums.size()));
    for (std::size_t half = sums.size() / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) {
            sums[i] += sums[i + half];
        }
    }
    const double count = static_cast<double>(block_sums.size()) * weights_in<BlockTQ2_0>;
    return half_from_float(static_cast<float>(sums[0] / count));
}

TernaryTensor quantize_ternary(const Kernel& kernel, Element element, const std::uint8_t* weights, MatrixShape shape,
                               std::optional<std::uint16_t> scale, int threads, std::uint8_t* bytes, RowSums* sums) {
    const std::int64_t blocks = shape.columns / weights_in<BlockTQ2_0>;
    TernaryTensor tensor{};
    if (scale) {
        tensor.scale = *scale;
    } else {
        std::vector<double> block_sums(static_cast<std::size_t>(shape.rows * blocks));
        sum_magnitudes(kernel, element, weights, shape, threads, block_sums.data());
        tensor.scale = ternary_scale(block_sums);
        tensor.not_finite = first_not_finite(element, weights, shape, block_sums);
    }
    if ((tensor.scale & half_infinity_bits) == half_infinity_bits) {
        fill_not_a_number(shape.rows * blocks, bytes);
        if (sums != nullptr) {
            constexpr double nan = std::numeric_limits<double>::quiet_NaN();
            std::fill_n(sums, shape.rows, RowSums{nan, nan});
        }
        return tensor;
    }
    const QuantizeTernaryRow quantize_row = kernel.quantize_ternary[static_cast<std::int32_t>(element)];
    const auto [parts, workers] = split(shape, threads);
    for_each_part(shape.rows, parts, workers, [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t row = first; row < last; ++row) {
            const std::uint8_t* source = weights + row * shape.columns * element_bytes(element);
            std::uint8_t* target = bytes + row * blocks * static_cast<std::int64_t>(sizeof(BlockTQ2_0));
            quantize_row(source, blocks, tensor.scale, target, sums == nullptr ? nullptr : sums + row);
        }
    });
    return tensor;
}

void dequantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* bytes,
                       MatrixShape shape, int threads, std::uint8_t* weights) {
    const DequantizeRow dequantize_row = kernel.dequantize[format.index][static_cast<std::int32_t>(element)];
    const std::int64_t blocks = shape.columns / format.block_weights;
    const auto [parts, workers] = split(shape, threads);
    for_each_part(shape.rows, parts, workers, [&](int, std::int64_t first, std::int64_t last) {
        // Rows follow each other without gaps, so a part is one long row.
        dequantize_row(bytes + first * blocks * format.block_bytes, (last - first) * blocks,
                       weights + first * shape.columns * element_bytes(element));
    });
}

}  // namespace quantlab
