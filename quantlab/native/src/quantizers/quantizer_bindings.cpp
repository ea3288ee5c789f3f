// Checks shapes and hands arrays to the quantizers without the interpreter lock; quantlab/native/quantizers.py is the
// door for Python.
#include "quantizer_bindings.h"

#include "quantizers.h"

#include "../argument_checks.h"
#include "../array_argument.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace nb = nanobind;

namespace quantlab::quantizers {

namespace {

// More than anyone waits for; every product of them fits an int.
constexpr int most_effort = 1000;

// A weight matrix and its blocks, kept alive while the core works on them.
struct HeldWeight {
    Array<const float, 2> weights;
    Array<std::uint8_t, 2> blocks;
    WeightView view;
};

std::int64_t extent(const auto& array, std::size_t axis) { return static_cast<std::int64_t>(array.shape(axis)); }

Array<const float, 2> weights_of(nb::handle given) {
    auto weights = array_of<const float, 2>("weights", given, "[rows, columns]");
    const std::int64_t columns = extent(weights, 1);
    require(columns > 0 && columns % block_columns == 0,
            "weights have " + std::to_string(columns) + " columns; expected a multiple of 32");
    check_finite("weights", weights);
    return weights;
}

HeldWeight held(const std::string& format, std::int64_t levels, nb::handle weights_given, nb::handle blocks_given) {
    auto blocks = array_of<std::uint8_t, 2>("blocks", blocks_given, "[rows, row bytes]");
    const BlockFormat& found = known_format_of_own_scales(format);
    const std::int32_t used = checked_levels(found, levels);
    auto weights = weights_of(weights_given);
    const WeightView view{weights.data(), extent(weights, 0), extent(weights, 1), &found, used, blocks.data()};
    check_shape("blocks", blocks, view.rows, view.row_bytes());
    return {std::move(weights), std::move(blocks), view};
}

void require_columns(std::int64_t columns, std::int64_t expected, const char* subject) {
    require(columns == expected, std::string(subject) + " has " + std::to_string(columns) + " columns; expected " +
                                     std::to_string(expected));
}

Array<const float, 1> importance_of(nb::handle given, std::int64_t columns) {
    auto importance = array_of<const float, 1>("importance", given, "[columns]");
    require_columns(extent(importance, 0), columns, "importance");
    check_finite("importance", importance);
    return importance;
}

SearchEffort search_effort(std::int64_t clips, std::int64_t rounds) {
    return {checked_number("clips", clips, 2, most_effort), checked_number("rounds", rounds, 0, most_effort)};
}

Array<const float, 2> moment_of(nb::handle given) {
    auto moment = array_of<const float, 2>("moment", given, "[columns, columns]");
    const std::int64_t columns = extent(moment, 0);
    require(columns > 0 && columns % block_columns == 0 && extent(moment, 1) == columns,
            "moment has shape [" + std::to_string(columns) + ", " + std::to_string(extent(moment, 1)) +
                "]; a second moment must be square, of whole blocks of 32 columns");
    return moment;
}

std::vector<std::int32_t> checked_order(nb::handle given, std::int64_t columns) {
    const auto order = array_of<const std::int32_t, 1>("order", given, "[columns]");
    require_columns(extent(order, 0), columns, "order");
    const std::vector<std::int32_t> copy(order.data(), order.data() + columns);
    std::vector<bool> seen(static_cast<std::size_t>(columns));
    for (const std::int32_t column : copy) {
        require(column >= 0 && column < columns && !seen[static_cast<std::size_t>(column)],
                "order is not a permutation of the columns: " + std::to_string(column) + " is " +
                    (column >= 0 && column < columns ? "there twice" : "none of " + std::to_string(columns)));
        seen[static_cast<std::size_t>(column)] = true;
    }
    return copy;
}

std::optional<FeedbackFactor> new_factor(nb::handle moment_given, double damping, nb::handle order_given,
                                         std::int64_t threads) {
    const auto moment = moment_of(moment_given);
    const std::vector<std::int32_t> columns = checked_order(order_given, extent(moment, 0));
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    return FeedbackFactor::of(chosen_quantizers(), {moment.data(), extent(moment, 0)}, damping, columns.data(), most);
}

void new_moment(SecondMoment* place, nb::handle moment_given, float damping, std::int64_t threads) {
    const auto moment = moment_of(moment_given);
    check_finite("moment", moment);
    require(std::isfinite(damping), "damping must be a finite number of single precision");
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    new (place) SecondMoment({moment.data(), extent(moment, 0)}, damping, most);
}

const Kernel& rounding_kernel() {
    const Kernel* rounding = chosen_kernel();
    require(rounding != nullptr, "no such kernel");
    return *rounding;
}

void search(const std::string& format, std::int64_t levels, nb::handle weights, nb::handle importance_given,
            bool by_magnitude, std::int64_t clips, std::int64_t rounds, std::int64_t threads, nb::handle blocks) {
    const HeldWeight weight = held(format, levels, weights, blocks);
    const auto importance = importance_of(importance_given, weight.view.columns);
    const SearchEffort effort = search_effort(clips, rounds);
    const int most = checked_threads(threads);
    const Kernel& rounding = rounding_kernel();
    nb::gil_scoped_release unlocked;
    search_scales(chosen_quantizers(), rounding, weight.view, importance.data(), by_magnitude, effort, most);
}

bool has_whole_blocks(const FeedbackFactor& factor) {
    for (std::size_t i = 0; i < factor.order().size(); ++i) {
        const std::size_t first = i / block_columns * block_columns;
        if (factor.order()[i] / block_columns != factor.order()[first] / block_columns) {
            return false;
        }
    }
    return true;
}

void feedback(const std::string& format, std::int64_t levels, nb::handle weights, const FeedbackFactor& factor,
              nb::handle importance_given, bool given_scales, std::int64_t clips, std::int64_t rounds,
              std::int64_t trials, std::int64_t threads, nb::handle blocks) {
    const HeldWeight weight = held(format, levels, weights, blocks);
    require_columns(factor.columns(), weight.view.columns, "the factor");
    Array<const float, 1> importance;  // without memory: the factor's pivots
    if (!importance_given.is_none()) {
        importance = importance_of(importance_given, weight.view.columns);
    }
    require(given_scales || has_whole_blocks(factor), "the factor's order mixes blocks; scales must be given then");
    const FeedbackEffort effort{search_effort(clips, rounds), checked_number("trials", trials, 0, most_effort)};
    const int most = checked_threads(threads);
    const float* columns = importance.is_valid() ? importance.data() : nullptr;
    nb::gil_scoped_release unlocked;
    feed_back_errors(chosen_quantizers(), weight.view, factor, columns,
                     given_scales ? ScaleTime::before : ScaleTime::reached, effort, most);
}

void refit(const std::string& format, std::int64_t levels, nb::handle weights, const SecondMoment& moment, float ridge,
           std::int64_t threads, nb::handle blocks) {
    const HeldWeight weight = held(format, levels, weights, blocks);
    require_columns(moment.columns(), weight.view.columns, "the second moment");
    require(std::isfinite(ridge) && ridge >= 0, "ridge must be a finite number from 0 on");
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    refit_scales(chosen_quantizers(), weight.view, moment, ridge, most);
}

// -1 trials: none, not even with a block's own scales.
DescentEffort descent_effort(std::int64_t trials, std::int64_t passes, bool scales) {
    return {checked_number("trials", trials, -1, most_effort), checked_number("passes", passes, 0, most_effort), scales};
}

void descend_codes(const std::string& format, std::int64_t levels, nb::handle weights, const SecondMoment& moment,
                   std::int64_t sweeps, std::int64_t trials, std::int64_t passes, bool scales, std::int64_t threads,
                   nb::handle blocks) {
    const HeldWeight weight = held(format, levels, weights, blocks);
    require_columns(moment.columns(), weight.view.columns, "the second moment");
    const int times = checked_number("sweeps", sweeps, 0, most_effort), most = checked_threads(threads);
    const DescentEffort effort = descent_effort(trials, passes, scales);
    nb::gil_scoped_release unlocked;
    descend(chosen_quantizers(), weight.view, moment, times, effort, most);
}

void refine(const std::string& format, std::int64_t levels, nb::handle weights, nb::handle tiles_given,
            std::int64_t trials, std::int64_t passes, std::int64_t threads, nb::handle blocks) {
    const HeldWeight weight = held(format, levels, weights, blocks);
    const auto tiles = array_of<const float, 3>("tiles", tiles_given, "[columns / 32, 32, 32]");
    require(extent(tiles, 0) == weight.view.blocks() && extent(tiles, 1) == block_columns &&
                extent(tiles, 2) == block_columns,
            "tiles has shape [" + std::to_string(extent(tiles, 0)) + ", " + std::to_string(extent(tiles, 1)) + ", " +
                std::to_string(extent(tiles, 2)) + "]; expected [" + std::to_string(weight.view.blocks()) +
                ", 32, 32], a tile for each block of a row");
    check_finite("tiles", tiles);
    const DescentEffort effort = descent_effort(trials, passes, true);
    const int most = checked_threads(threads);
    const Kernel& rounding = rounding_kernel();
    nb::gil_scoped_release unlocked;
    refine_blocks(chosen_quantizers(), rounding, weight.view, tiles.data(), effort, most);
}

// Without blocks (None), of the weights themselves.
void measure(const std::string& format, nb::handle weights_given, const SecondMoment& moment, std::int64_t threads,
             nb::handle blocks, nb::handle sums_given) {
    const BlockFormat& found = known_format_of_own_scales(format);
    HeldWeight weight;
    if (blocks.is_none()) {
        weight.weights = weights_of(weights_given);
        weight.view = {weight.weights.data(), extent(weight.weights, 0), extent(weight.weights, 1), &found,
                       found.most_levels,     nullptr};
    } else {
        weight = held(format, found.most_levels, weights_given, blocks);
    }
    const auto sums = array_of<double, 2>("sums", sums_given, "[rows, 2]");
    require_columns(moment.columns(), weight.view.columns, "the second moment");
    check_shape("sums", sums, weight.view.rows, 2);
    static_assert(sizeof(RowMeasures) == 2 * sizeof(double));
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    measure_errors(chosen_quantizers(), weight.view, moment, most, reinterpret_cast<RowMeasures*>(sums.data()));
}

}  // namespace

// Arrays may be None here, so that it is `array_of` that refuses it, by the argument's name.
void bind_quantizers(nb::module_& module) {
    nb::class_<SecondMoment>(module, "SecondMoment")
        .def("__init__", &new_moment, nb::arg("moment").none(), nb::arg("damping"), nb::arg("threads"));
    nb::class_<FeedbackFactor>(module, "FeedbackFactor");
    module.def("feedback_factor", &new_factor, nb::arg("moment").none(), nb::arg("damping"), nb::arg("order").none(),
               nb::arg("threads"));
    module.def("search_scales", &search, nb::arg("format"), nb::arg("levels"), nb::arg("weights").none(),
               nb::arg("importance").none(), nb::arg("by_magnitude"), nb::arg("clips"), nb::arg("rounds"),
               nb::arg("threads"), nb::arg("blocks").none());
    module.def("feed_back_errors", &feedback, nb::arg("format"), nb::arg("levels"), nb::arg("weights").none(),
               nb::arg("factor"), nb::arg("importance").none(), nb::arg("given_scales"), nb::arg("clips"),
               nb::arg("rounds"), nb::arg("trials"), nb::arg("threads"), nb::arg("blocks").none());
    module.def("refit_scales", &refit, nb::arg("format"), nb::arg("levels"), nb::arg("weights").none(),
               nb::arg("moment"), nb::arg("ridge"), nb::arg("threads"), nb::arg("blocks").none());
    module.def("descend", &descend_codes, nb::arg("format"), nb::arg("levels"), nb::arg("weights").none(),
               nb::arg("moment"), nb::arg("sweeps"), nb::arg("trials"), nb::arg("passes"), nb::arg("scales"),
               nb::arg("threads"), nb::arg("blocks").none());
    module.def("refine_blocks", &refine, nb::arg("format"), nb::arg("levels"), nb::arg("weights").none(),
               nb::arg("tiles").none(), nb::arg("trials"), nb::arg("passes"), nb::arg("threads"),
               nb::arg("blocks").none());
    module.def("measure_errors", &measure, nb::arg("format"), nb::arg("weights").none(), nb::arg("moment"),
               nb::arg("threads"), nb::arg("blocks").none(), nb::arg("sums").none());
}

}  // namespace quantlab::quantizers
