#include "quantizers.h"
#include "row_parts.h"

#include <algorithm>
#include <vector>

namespace quantlab::quantizers {

namespace {

// A part's rows on their way through the columns in processing order.
class FeedbackSweep {
public:
    FeedbackSweep(const QuantizerKernel& kernel, const WeightView& weight, const FeedbackFactor& factor,
                  const float* importance, ScaleTime time, const FeedbackEffort& effort)
        : kernel_(kernel), weight_(weight), factor_(factor), importance_(importance), time_(time), effort_(effort),
          range_(weight.range()) {}

    void run(std::vector<RowGroup>& groups) {
        if (time_ == ScaleTime::before) {
            for (RowGroup& group : groups) {
                group.read_blocks();
            }
        }
        errors_.assign(groups.size(), std::vector<float>(static_cast<std::size_t>(weight_.columns * lanes)));
        for (std::int64_t step = 0; step < weight_.blocks(); ++step) {
            for (std::size_t i = 0; i < groups.size(); ++i) {
                process(groups[i], errors_[i].data(), step);
            }
        }
        for (const RowGroup& group : groups) {
            group.write_blocks();
        }
    }

private:
    std::int64_t column_at(std::int64_t place) const { return factor_.order()[static_cast<std::size_t>(place)]; }

    void process(RowGroup& group, float* errors, std::int64_t step) {
        const std::int64_t first = step * block_columns;
        for (int j = 0; j < block_columns; ++j) {
            std::copy_n(group.weights(column_at(first + j)), lanes, weights_ + j * lanes);
        }
        std::copy_n(weights_, block_lanes, targets_);
        kernel_.add_products(factor_.panel(step), errors, first, targets_);
        if (time_ == ScaleTime::reached) {
            process_block(group, errors, step);
        } else {
            process_columns(group, errors, step);
        }
    }

    FeedbackBlock block_at(float* errors, std::int64_t step) {
        const std::int64_t first = step * block_columns;
        return {weights_,
                targets_,
                factor_.panel(step) + first * block_columns,
                factor_.pivots() + first,
                importances_,
                steps_,
                offsets_,
                codes_,
                errors + first * lanes};
    }

    void process_block(RowGroup& group, float* errors, std::int64_t step) {
        const std::int64_t first = step * block_columns, block = column_at(first) / block_columns;
        fill_importances(first);
        FeedbackBlock task = block_at(errors, step);
        task.steps = group.steps(block);
        task.offsets = group.offsets(block);
        kernel_.feedback(task, range_, effort_);
        store_codes(group, first);
    }

    // The columns of a step may lie in many blocks, so that each has scales of its own.
    void process_columns(RowGroup& group, float* errors, std::int64_t step) {
        const std::int64_t first = step * block_columns;
        for (int j = 0; j < block_columns; ++j) {
            const std::int64_t block = column_at(first + j) / block_columns;
            std::copy_n(group.steps(block), lanes, steps_ + j * lanes);
            std::copy_n(group.offsets(block), lanes, offsets_ + j * lanes);
        }
        kernel_.feedback_columns(block_at(errors, step), range_);
        store_codes(group, first);
    }

    void store_codes(RowGroup& group, std::int64_t first) {
        for (int j = 0; j < block_columns; ++j) {
            std::copy_n(codes_ + j * lanes, lanes, group.codes(column_at(first + j)));
        }
    }

    void fill_importances(std::int64_t first) {
        float columns[block_columns];
        for (int j = 0; j < block_columns; ++j) {
            columns[j] = importance_ == nullptr ? factor_.pivots()[first + j] : importance_[column_at(first + j)];
        }
        const bool none = std::all_of(columns, columns + block_columns, [](float x) { return x == 0.0f; });
        for (int j = 0; j < block_columns; ++j) {
            std::fill_n(importances_ + j * lanes, lanes, none ? 1.0f : columns[j]);
        }
    }

    const QuantizerKernel& kernel_;
    const WeightView& weight_;
    const FeedbackFactor& factor_;
    const float* importance_;
    ScaleTime time_;
    const FeedbackEffort& effort_;
    CodeRange range_;
    std::vector<std::vector<float>> errors_;  // of each group, [columns][16] in processing order
    float weights_[block_lanes], targets_[block_lanes], importances_[block_lanes];
    float codes_[block_lanes], steps_[block_lanes], offsets_[block_lanes];
};

}  // namespace

void feed_back_errors(const QuantizerKernel& kernel, const WeightView& weight, const FeedbackFactor& factor,
                      const float* importance, ScaleTime time, const FeedbackEffort& effort, int threads) {
    for_each_row_part(weight, threads, [&](std::vector<RowGroup>& groups) {
        FeedbackSweep(kernel, weight, factor, importance, time, effort).run(groups);
    });
}

}  // namespace quantlab::quantizers
