// Rounding to nearest as the least that a search has to reach.
#pragma once

#include "../kernels.h"
#include "row_group.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace quantlab::quantizers {

// Puts blocks that round to nearest in the place of those that are worse.
class Rounding {
public:
    Rounding(const Kernel& kernel, const WeightView& weight)
        : kernel_(kernel), weight_(weight), bytes_(static_cast<std::size_t>(weight.row_bytes())),
          rounded_(static_cast<std::size_t>(weight.columns)), found_(rounded_.size()) {}

    // error(block, errors): what a block's rounding errors, double [32], amount to.
    template <typename Error>
    void replace_worse(std::int64_t row, const Error& error) {
        constexpr auto f32 = static_cast<std::int32_t>(Element::f32);
        const float* original = weight_.values + row * weight_.columns;
        std::uint8_t* bytes = weight_.bytes + row * weight_.row_bytes();
        const auto dequantize = kernel_.dequantize[weight_.format->index][f32];
        const auto as_bytes = [](float* values) { return reinterpret_cast<std::uint8_t*>(values); };
        kernel_.quantize[weight_.format->index][f32](reinterpret_cast<const std::uint8_t*>(original), weight_.blocks(),
                                                     weight_.levels, bytes_.data(), nullptr);
        dequantize(bytes_.data(), weight_.blocks(), as_bytes(rounded_.data()));
        dequantize(bytes, weight_.blocks(), as_bytes(found_.data()));
        for (std::int64_t block = 0; block < weight_.blocks(); ++block) {
            const std::int64_t column = block * block_columns;
            double found_errors[block_columns], rounded_errors[block_columns];
            for (int j = 0; j < block_columns; ++j) {
                const double value = original[column + j];
                const auto place = static_cast<std::size_t>(column + j);
                found_errors[j] = value - found_[place];
                rounded_errors[j] = value - rounded_[place];
            }
            const double found = error(block, found_errors), rounded = error(block, rounded_errors);
            if (!(found <= rounded)) {
                const std::int64_t place = block * weight_.format->block_bytes;
                std::copy_n(bytes_.data() + place, weight_.format->block_bytes, bytes + place);
            }
        }
    }

private:
    const Kernel& kernel_;
    const WeightView& weight_;
    std::vector<std::uint8_t> bytes_;
    std::vector<float> rounded_, found_;
};

}  // namespace quantlab::quantizers
