// The conversions of one row, in one variant for each instruction set, and the choice among them.
//
// The portable variant is the specification. Every other gives the same bytes and the same sums to the last bit for
// every input; only the payload of a NaN that a block of infinite or NaN scale decodes to is left open.
#pragma once

#include "blocks.h"
#include "numbers.h"
#include "ternary.h"

#include <cstdint>
#include <string_view>

namespace quantlab {

// Of one row: the squares of (decoded weight - weight), each difference rounded to fp32, and of the weights. Squares
// are exact in double precision. Eight lanes add them, lane l those of columns l, l + 8, l + 16 ...; the lanes are
// then added as `folded` does, so that the sums depend on nothing but the row.
struct RowSums {
    double squared_errors;
    double squared_weights;
};

inline constexpr std::int32_t sum_lanes = 8;

inline double folded(const double (&lanes)[sum_lanes]) {
    const double even = (lanes[0] + lanes[4]) + (lanes[2] + lanes[6]);
    const double odd = (lanes[1] + lanes[5]) + (lanes[3] + lanes[7]);
    return even + odd;
}

// Encodes `blocks` consecutive blocks, at any alignment of weights and bytes. `sums` may be null. Returns whether all
// weights are finite and all scales and minima are within half precision.
using QuantizeRow = bool (*)(const std::uint8_t* weights, std::int64_t blocks, std::int32_t levels,
                             std::uint8_t* bytes, RowSums* sums);

// Decodes `blocks` consecutive blocks in fp32 and rounds to the element type, to nearest with ties to even.
using DequantizeRow = void (*)(const std::uint8_t* bytes, std::int64_t blocks, std::uint8_t* weights);

// The sums of the magnitudes of `blocks` consecutive blocks of BlockTQ2_0, each added up as ternary.h says.
using SumMagnitudes = void (*)(const std::uint8_t* weights, std::int64_t blocks, double* sums);

// Encodes `blocks` consecutive blocks of a tensor whose scale, finite and not negative, is given in half precision.
using QuantizeTernaryRow = void (*)(const std::uint8_t* weights, std::int64_t blocks, std::uint16_t scale,
                                    std::uint8_t* bytes, RowSums* sums);

// By a format's index and an element type. `quantize` is null for a format with one scale a tensor.
struct Kernel {
    std::string_view name;
    QuantizeRow quantize[format_count][element_count];
    DequantizeRow dequantize[format_count][element_count];
    SumMagnitudes sum_magnitudes[element_count];
    QuantizeTernaryRow quantize_ternary[element_count];
};

// Fills a kernel from templates `Rows::quantize<Block, element>`, `Rows::dequantize<Block, element>`,
// `Rows::sum_magnitudes<element>` and `Rows::quantize_ternary<element>`.
template <typename Rows>
struct KernelTable {
    template <typename Block>
    static constexpr void fill(Kernel& kernel, std::int32_t format) {
        fill<Block, Element::f32>(kernel, format);
        fill<Block, Element::f16>(kernel, format);
        fill<Block, Element::bf16>(kernel, format);
    }

    template <typename Block, Element element>
    static constexpr void fill(Kernel& kernel, std::int32_t format) {
        kernel.quantize[format][static_cast<std::int32_t>(element)] = Rows::template quantize<Block, element>;
        kernel.dequantize[format][static_cast<std::int32_t>(element)] = Rows::template dequantize<Block, element>;
    }

    template <Element element>
    static constexpr void fill_ternary(Kernel& kernel, std::int32_t format) {
        const auto place = static_cast<std::int32_t>(element);
        kernel.dequantize[format][place] = Rows::template dequantize<BlockTQ2_0, element>;
        kernel.sum_magnitudes[place] = Rows::template sum_magnitudes<element>;
        kernel.quantize_ternary[place] = Rows::template quantize_ternary<element>;
    }

    static constexpr Kernel named(std::string_view name) {
        Kernel kernel{name, {}, {}, {}, {}};
        fill<BlockQ4_0>(kernel, 0);
        fill<BlockQ4_1>(kernel, 1);
        fill<BlockQ5_0>(kernel, 2);
        fill<BlockQ5_1>(kernel, 3);
        fill<BlockQ8_0>(kernel, 4);
        fill_ternary<Element::f32>(kernel, 5);
        fill_ternary<Element::f16>(kernel, 5);
        fill_ternary<Element::bf16>(kernel, 5);
        return kernel;
    }
};

const Kernel& portable_kernel();

// The variant for x86 processors with AVX2 and F16C; nullptr where this build or this processor has none.
const Kernel* avx2_kernel();

// That of the chosen instruction set (instruction_set.h), AVX2's for those beyond; nullptr if none is chosen.
const Kernel* chosen_kernel();

}  // namespace quantlab
