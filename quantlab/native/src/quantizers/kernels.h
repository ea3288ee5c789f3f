// The inner loops of the quantizers in one variant for each instruction set; all give the same bits.
#pragma once

#include "block_codes.h"
#include "descent_block.h"
#include "factor_tiles.h"
#include "feedback_block.h"
#include "normal_equations.h"

namespace quantlab::quantizers {

struct SearchBlock {
    const float* values;   // [32][16]
    const float* weights;  // [32][16]
    float* steps;          // [16]
    float* offsets;        // [16]
    float* codes;          // [32][16]
};

// `trials`: of moving a block's ends with all its codes chosen anew, or negative to leave that out. `passes`: over
// single codes after it. `scales`: whether step and offset move too in these.
struct DescentEffort {
    int trials;
    int passes;
    bool scales;
};

struct QuantizerKernel {
    void (*search)(const SearchBlock& block, const CodeRange& range, const SearchEffort& effort);
    void (*add_products)(const float* panel, const float* values, std::int64_t count, float* out);
    void (*feedback)(const FeedbackBlock& block, const CodeRange& range, const FeedbackEffort& effort);
    void (*feedback_columns)(const FeedbackBlock& block, const CodeRange& range);  // scales given
    void (*improve)(const FeedbackBlock& block, const CodeRange& range, int trials);
    void (*descend)(const DescentBlock& block, const CodeRange& range, const DescentEffort& effort);
    void (*moment_products)(const float* moments, const float* codes_b, const float* codes_a, float* with_codes,
                            float* with_ones);
    void (*solve)(float* matrix, std::int64_t count, float* right);
    void (*square)(float* factor, std::int64_t count, const float* vector, float* scratch, float* result);
    void (*finish_columns)(const double* triangle, std::int64_t stride, std::int64_t count, double* columns,
                           double* copy);
    void (*subtract_tile)(const double* left, const double* right, std::int64_t count, double* rows,
                          std::int64_t stride);
};

// L: lanes of engine/lanes.h, D: of double_lanes.h.
template <typename L, typename D>
struct Kernels {
    static void search(const SearchBlock& block, const CodeRange& range, const SearchEffort& effort) {
        ScaleSearch<L> search(block.values, block.weights, range, effort);
        const Scales<L> found = search.run();
        found.step.store(block.steps);
        found.offset.store(block.offsets);
        const L inverse = inverse_or_zero(found.step);
        for (int j = 0; j < block_columns; ++j) {
            const L value = L::load(block.values + j * lanes);
            nearest_code(value, found.offset, inverse, range).store(block.codes + j * lanes);
        }
    }

    static void products(const float* panel, const float* values, std::int64_t count, float* out) {
        add_products<L>(panel, values, count, out);
    }

    static void feedback(const FeedbackBlock& block, const CodeRange& range, const FeedbackEffort& effort) {
        BlockFeedback<L> feedback(block, range);
        feedback.find_scales(effort);
        feedback.run({L::load(block.steps), L::load(block.offsets)});
    }

    static void feedback_columns(const FeedbackBlock& block, const CodeRange& range) {
        BlockFeedback<L>(block, range).run_columns();
    }

    static void improve(const FeedbackBlock& block, const CodeRange& range, int trials) {
        BlockFeedback<L>(block, range).improve(trials);
    }

    static void descend(const DescentBlock& block, const CodeRange& range, const DescentEffort& effort) {
        BlockDescent<L> descent(block, range);
        for (int pass = 0; pass < effort.passes; ++pass) {
            descent.move_codes();
            if (effort.scales) {
                descent.move_scales();
            }
        }
        descent.update_errors();
    }

    static void moments(const float* moments, const float* codes_b, const float* codes_a, float* with_codes,
                        float* with_ones) {
        moment_products<L>(moments, codes_b, codes_a, with_codes, with_ones);
    }

    static void solve(float* matrix, std::int64_t count, float* right) {
        LaneSystem<L> system(matrix, count);
        system.factor();
        system.solve(right);
    }

    static void square(float* factor, std::int64_t count, const float* vector, float* scratch, float* result) {
        LaneSystem<L>(factor, count).square_of(vector, scratch).store(result);
    }

    static void finish(const double* triangle, std::int64_t stride, std::int64_t count, double* columns,
                       double* copy) {
        finish_columns<D>(triangle, stride, count, columns, copy);
    }

    static void subtract(const double* left, const double* right, std::int64_t count, double* rows,
                         std::int64_t stride) {
        subtract_tile<D>(left, right, count, rows, stride);
    }

    static constexpr QuantizerKernel table{search,  products, feedback, feedback_columns, improve, descend,
                                           moments, solve,    square,   finish,           subtract};
};

const QuantizerKernel& scalar_quantizers();

// The variant for x86 processors with AVX2, FMA and F16C; nullptr where this build or this processor has none.
const QuantizerKernel* avx2_quantizers();

// That of the chosen instruction set (instruction_set.h), AVX2's for those beyond.
const QuantizerKernel& chosen_quantizers();

}  // namespace quantlab::quantizers
