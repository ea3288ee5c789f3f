#include "moment_products.h"
#include "quantizers.h"
#include "row_parts.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace quantlab::quantizers {

namespace {

// The scales of sixteen rows as unknowns of their own systems of equations. The change of a row's decoded weights is
// linear in the changes of its steps and offsets; where a block has an offset, codes count from the middle of their
// range, so that the two hardly interfere.
class ScaleSystem {
public:
    ScaleSystem(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, float ridge)
        : kernel_(kernel), moment_(moment), range_(weight.range()), ridge_(ridge), blocks_(weight.blocks()),
          per_block_(range_.has_offset ? 2 : 1), count_(padded(per_block_ * blocks_)),
          middle_(range_.has_offset ? 0.5f * (range_.least + range_.most) : 0.0f),
          matrix_(static_cast<std::size_t>(triangle_place(count_, 0) * lanes)),
          codes_(static_cast<std::size_t>(weight.columns * lanes)), right_(static_cast<std::size_t>(count_ * lanes)),
          solution_(right_.size()), scratch_(right_.size()) {}

    void improve(RowGroup& group) {
        for (std::int64_t column = 0; column < blocks_ * block_columns; ++column) {
            for (int row = 0; row < lanes; ++row) {
                codes_at(column)[row] = group.codes(column)[row] - middle_;
            }
        }
        fill_matrix();
        fill_right(group);
        solution_ = right_;
        kernel_.solve(matrix_.data(), count_, solution_.data());
        round_changes(group);
        apply(group);
    }

private:
    static std::int64_t padded(std::int64_t count) {
        return (count + unknowns_at_once - 1) / unknowns_at_once * unknowns_at_once;
    }
    float* codes_at(std::int64_t column) { return codes_.data() + column * lanes; }
    float* element(std::int64_t i, std::int64_t j) { return matrix_.data() + triangle_place(i, j) * lanes; }
    std::int64_t step_at(std::int64_t block) const { return per_block_ * block; }

    void fill_matrix() {
        float with_ones[lanes];
        for (std::int64_t a = 0; a < blocks_; ++a) {
            for (std::int64_t b = 0; b <= a; ++b) {
                float* both_steps = element(step_at(a), step_at(b));
                const float *codes_a = codes_at(a * block_columns), *codes_b = codes_at(b * block_columns);
                kernel_.moment_products(moment_.tile(b, a), codes_b, codes_a, both_steps, with_ones);
                if (range_.has_offset) {
                    fill_offsets(a, b, with_ones);
                }
            }
        }
        for (std::int64_t i = 0; i < count_; ++i) {
            const bool is_padding = i >= per_block_ * blocks_;
            if (is_padding) {
                std::fill_n(element(i, 0), (i + 1) * lanes, 0.0f);
            }
            for (int row = 0; row < lanes; ++row) {
                float& diagonal = element(i, i)[row];
                diagonal = is_padding || !(diagonal > 0.0f) ? 1.0f : diagonal + ridge_ * diagonal;
            }
        }
    }

    // a's offset with b's step and offset, and a's step with b's offset.
    void fill_offsets(std::int64_t a, std::int64_t b, const float* with_ones) {
        const float* block_sums = moment_.block_sums(b) + a * block_columns;
        const float* codes = codes_at(a * block_columns);
        float total = 0.0f, with_codes[lanes] = {};
        for (int i = 0; i < block_columns; ++i) {
            total += block_sums[i];
            for (int row = 0; row < lanes; ++row) {
                with_codes[row] += codes[i * lanes + row] * block_sums[i];
            }
        }
        std::copy_n(with_ones, lanes, element(step_at(a) + 1, step_at(b)));
        std::fill_n(element(step_at(a) + 1, step_at(b) + 1), lanes, total);
        if (b < a) {
            std::copy_n(with_codes, lanes, element(step_at(a), step_at(b) + 1));
        }
    }

    void fill_right(RowGroup& group) {
        float gradients[block_lanes];
        std::fill(right_.begin(), right_.end(), 0.0f);
        for (std::int64_t block = 0; block < blocks_; ++block) {
            multiply_block(kernel_, moment_, block, group.errors(0), gradients);
            float* right = right_.data() + step_at(block) * lanes;
            for (int j = 0; j < block_columns; ++j) {
                const float* codes = codes_at(block * block_columns + j);
                for (int row = 0; row < lanes; ++row) {
                    const float gradient = gradients[j * lanes + row];
                    right[row] += codes[row] * gradient;
                    if (range_.has_offset) {
                        right[lanes + row] += gradient;
                    }
                }
            }
        }
    }

    // The solution becomes the change between scales that half precision can hold.
    void round_changes(RowGroup& group) {
        for (std::int64_t block = 0; block < blocks_; ++block) {
            float* step_change = solution_.data() + step_at(block) * lanes;
            for (int row = 0; row < lanes; ++row) {
                const float step = group.steps(block)[row];
                const float moved = rounded_to_half(step + step_change[row]);
                step_change[row] = moved - step;
                if (range_.has_offset) {
                    float& offset_change = step_change[lanes + row];
                    const float offset = group.offsets(block)[row], centre = offset + step * middle_;
                    const float moved_offset = rounded_to_half(centre + offset_change - moved * middle_);
                    offset_change = moved_offset + moved * middle_ - centre;
                }
            }
        }
    }

    static float rounded_to_half(float value) { return float_from_half(half_from_float(value)); }

    // Takes the changes in the rows where the weighted error falls.
    void apply(RowGroup& group) {
        float squares[lanes], fall[lanes] = {};
        kernel_.square(matrix_.data(), count_, solution_.data(), scratch_.data(), squares);
        for (std::int64_t i = 0; i < count_; ++i) {
            for (int row = 0; row < lanes; ++row) {
                const auto place = static_cast<std::size_t>(i * lanes + row);
                fall[row] += 2.0f * solution_[place] * right_[place];
            }
        }
        for (std::int64_t block = 0; block < blocks_; ++block) {
            const float* change = solution_.data() + step_at(block) * lanes;
            for (int row = 0; row < lanes; ++row) {
                if (!(fall[row] > squares[row])) {  // not for NaN
                    continue;
                }
                float &step = group.steps(block)[row], &offset = group.offsets(block)[row];
                const float moved = rounded_to_half(step + change[row]);
                if (range_.has_offset) {
                    offset = rounded_to_half(offset + step * middle_ + change[lanes + row] - moved * middle_);
                }
                step = moved;
            }
            group.update_errors(block);
        }
    }

    const QuantizerKernel& kernel_;
    const SecondMoment& moment_;
    CodeRange range_;
    float ridge_;
    std::int64_t blocks_;
    std::int64_t per_block_;
    std::int64_t count_;
    float middle_;
    std::vector<float> matrix_;                      // [triangle][16]
    std::vector<float> codes_;                       // [columns][16], from the middle
    std::vector<float> right_, solution_, scratch_;  // [count][16]
};

}  // namespace

void refit_scales(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, float ridge,
                  int threads) {
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        ScaleSystem system(kernel, weight, moment, ridge);
        for (RowGroup& group : groups) {
            group.read_blocks();
            system.improve(group);
            group.write_blocks();
        }
    });
}

}  // namespace quantlab::quantizers
