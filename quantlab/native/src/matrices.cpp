#include "matrices.h"

#include "threads.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

void note_first(std::optional<Position>& first, std::int64_t row, std::optional<std::int64_t> index) {
    if (!first && index) {
        first = Position{row, *index};
    }
}

}  // namespace

Faults quantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* weights,
                       MatrixShape shape, std::int32_t levels, int threads, std::uint8_t* bytes, RowSums* sums) {
    const QuantizeRow quantize_row = kernel.quantize[format.index][static_cast<std::int32_t>(element)];
    const std::int64_t blocks = shape.columns / weights_per_block;
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

void dequantize_matrix(const Kernel& kernel, const BlockFormat& format, Element element, const std::uint8_t* bytes,
                       MatrixShape shape, int threads, std::uint8_t* weights) {
    const DequantizeRow dequantize_row = kernel.dequantize[format.index][static_cast<std::int32_t>(element)];
    const std::int64_t blocks = shape.columns / weights_per_block;
    const auto [parts, workers] = split(shape, threads);
    for_each_part(shape.rows, parts, workers, [&](int, std::int64_t first, std::int64_t last) {
        // Rows follow each other without gaps, so a part is one long row.
        dequantize_row(bytes + first * blocks * format.block_bytes, (last - first) * blocks,
                       weights + first * shape.columns * element_bytes(element));
    });
}

}  // namespace quantlab
