// The quantizers over whole weights: blocks in, better blocks out. Threads split the rows and nothing else, so bytes do
// not depend on their number.
#pragma once

#include "../kernels.h"
#include "row_group.h"
#include "second_moment.h"

#include <cstdint>

namespace quantlab::quantizers {

// Scales by weighted search, codes to nearest. `importance` [columns] weighs the squared errors; a block whose columns
// all have weight zero counts them alike. If `by_magnitude`, an error counts sqrt(mean square of the row + w^2) times
// as well (ggml's importance-matrix path). Where rounding to nearest has the lower weighted error (without that factor,
// in double precision), its block is taken: `rounding` computes it.
void search_scales(const QuantizerKernel& kernel, const Kernel& rounding, const WeightView& weight,
                   const float* importance, bool by_magnitude, const SearchEffort& effort, int threads);

// Scales of a block: found as it is reached, for targets with feedback (each run of 32 columns in the factor's order is
// one block then); or found beforehand, by the caller, and read from the weight's blocks.
enum class ScaleTime { reached, before };

// Error feedback from column to column in the factor's order. `importance` [columns] in storage order weighs the search
// of scales; null takes the factor's pivots.
void feed_back_errors(const QuantizerKernel& kernel, const WeightView& weight, const FeedbackFactor& factor,
                      const float* importance, ScaleTime time, const FeedbackEffort& effort, int threads);

// Solves for all scales of a row together, codes fixed, and takes the solution where the weighted error falls after
// rounding to half precision. `ridge` is added to the diagonal of the normal equations, relative to it.
void refit_scales(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, float ridge,
                  int threads);

// Passes over all blocks, each moved to a lower weighted error of its row.
void descend(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, int sweeps,
             const DescentEffort& effort, int threads);

// Moves every block to a lower error by its own tile of the second moment, `tiles` [blocks][32][32], as if the errors
// of different blocks were independent: one visit as `descend` has them. Starts from rounding to nearest where that has
// the lower error, in double precision. Blocks whose tile is not positive definite stay as they are.
void refine_blocks(const QuantizerKernel& kernel, const Kernel& rounding, const WeightView& weight, const float* tiles,
                   const DescentEffort& effort, int threads);

// x H x^T and x x^T of one row.
struct RowMeasures {
    double weighted;
    double plain;
};

// Of each row's rounding errors, or of its weights if the view has no blocks (null).
void measure_errors(const QuantizerKernel& kernel, const WeightView& weight, const SecondMoment& moment, int threads,
                    RowMeasures* measures);

}  // namespace quantlab::quantizers
