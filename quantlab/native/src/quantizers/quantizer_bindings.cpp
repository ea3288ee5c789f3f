// Checks shapes and hands arrays to the quantizers without the interpreter lock; quantlab/native/quantizers.py is the
// door for Python.
#include "quantizer_bindings.h"

#include "quantizers.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace quantlab::quantizers {

namespace {

template <typename Element>
using Matrix = nb::ndarray<Element, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename Element>
using Vector = nb::ndarray<Element, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool condition, const std::string& message) {
    if (!condition) {
        throw nb::value_error(message.c_str());
    }
}

template <typename Array>
std::int64_t extent(const Array& array, std::size_t axis) {
    return static_cast<std::int64_t>(array.shape(axis));
}

int checked(int threads) {
    require(threads >= 1, "cannot use " + std::to_string(threads) + " threads; expected at least 1");
    return std::min(threads, 1024);
}

WeightView view(const std::string& format, std::int32_t levels, const Matrix<const float>& weights,
                const Matrix<std::uint8_t>& blocks) {
    const BlockFormat* found = find_block_format(format);
    require(found != nullptr, "unknown block format '" + format + "'");
    require(levels >= found->fewest_levels && levels <= found->most_levels,
            format + " cannot use " + std::to_string(levels) + " levels");
    const WeightView weight{weights.data(), extent(weights, 0), extent(weights, 1), found, levels, blocks.data()};
    require(weight.columns > 0 && weight.columns % block_columns == 0, "weights need columns of whole blocks");
    require(extent(blocks, 0) == weight.rows && extent(blocks, 1) == weight.row_bytes(),
            "blocks have another shape than the weights");
    return weight;
}

void require_columns(std::int64_t columns, std::int64_t expected, const char* subject) {
    require(columns == expected, std::string(subject) + " has " + std::to_string(columns) + " columns; expected " +
                                     std::to_string(expected));
}

SearchEffort search_effort(int clips, int rounds) {
    require(clips >= 2 && rounds >= 0, "a search needs two clips at least and no negative number of rounds");
    return {clips, rounds};
}

MomentView moment_view(const Matrix<const float>& moment) {
    const MomentView found{moment.data(), extent(moment, 0)};
    require(found.columns > 0 && found.columns % block_columns == 0 && extent(moment, 1) == found.columns,
            "a second moment must be square, of whole blocks");
    return found;
}

std::vector<std::int32_t> checked_order(const Vector<const std::int32_t>& order, std::int64_t columns) {
    require_columns(extent(order, 0), columns, "order");
    std::vector<bool> seen(static_cast<std::size_t>(columns));
    for (std::int64_t i = 0; i < columns; ++i) {
        const std::int32_t column = order.data()[i];
        require(column >= 0 && column < columns && !seen[static_cast<std::size_t>(column)],
                "order is not a permutation of the columns");
        seen[static_cast<std::size_t>(column)] = true;
    }
    return {order.data(), order.data() + columns};
}

std::optional<FeedbackFactor> new_factor(const Matrix<const float>& moment, double damping,
                                         const Vector<const std::int32_t>& order, int threads) {
    const MomentView found = moment_view(moment);
    const std::vector<std::int32_t> columns = checked_order(order, found.columns);
    const int most = checked(threads);
    nb::gil_scoped_release unlocked;
    return FeedbackFactor::of(chosen_quantizers(), found, damping, columns.data(), most);
}

void new_moment(SecondMoment* place, const Matrix<const float>& moment, float damping, int threads) {
    const MomentView found = moment_view(moment);
    const int most = checked(threads);
    nb::gil_scoped_release unlocked;
    new (place) SecondMoment(found, damping, most);
}

void search(const std::string& format, std::int32_t levels, const Matrix<const float>& weights,
            const Vector<const float>& importance, bool by_magnitude, int clips, int rounds, int threads,
            const Matrix<std::uint8_t>& blocks) {
    const WeightView weight = view(format, levels, weights, blocks);
    require_columns(extent(importance, 0), weight.columns, "importance");
    const SearchEffort effort = search_effort(clips, rounds);
    const int most = checked(threads);
    const Kernel* rounding = chosen_kernel();
    require(rounding != nullptr, "no such kernel");
    nb::gil_scoped_release unlocked;
    search_scales(chosen_quantizers(), *rounding, weight, importance.data(), by_magnitude, effort, most);
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

void feedback(const std::string& format, std::int32_t levels, const Matrix<const float>& weights,
              const FeedbackFactor& factor, const std::optional<Vector<const float>>& importance, bool given_scales,
              int clips, int rounds, int trials, int threads, const Matrix<std::uint8_t>& blocks) {
    const WeightView weight = view(format, levels, weights, blocks);
    require_columns(factor.columns(), weight.columns, "the factor");
    if (importance) {
        require_columns(extent(*importance, 0), weight.columns, "importance");
    }
    require(given_scales || has_whole_blocks(factor), "the factor's order mixes blocks; scales must be given then");
    const FeedbackEffort effort{search_effort(clips, rounds), trials};
    const int most = checked(threads);
    const float* columns = importance ? importance->data() : nullptr;
    nb::gil_scoped_release unlocked;
    feed_back_errors(chosen_quantizers(), weight, factor, columns,
                     given_scales ? ScaleTime::before : ScaleTime::reached, effort, most);
}

void refit(const std::string& format, std::int32_t levels, const Matrix<const float>& weights,
           const SecondMoment& moment, float ridge, int threads, const Matrix<std::uint8_t>& blocks) {
    const WeightView weight = view(format, levels, weights, blocks);
    require_columns(moment.columns(), weight.columns, "the second moment");
    const int most = checked(threads);
    nb::gil_scoped_release unlocked;
    refit_scales(chosen_quantizers(), weight, moment, ridge, most);
}

void descend_codes(const std::string& format, std::int32_t levels, const Matrix<const float>& weights,
                   const SecondMoment& moment, int sweeps, int trials, int passes, bool scales, int threads,
                   const Matrix<std::uint8_t>& blocks) {
    const WeightView weight = view(format, levels, weights, blocks);
    require_columns(moment.columns(), weight.columns, "the second moment");
    const int most = checked(threads);
    nb::gil_scoped_release unlocked;
    descend(chosen_quantizers(), weight, moment, sweeps, {trials, passes, scales}, most);
}

using Tiles = nb::ndarray<const float, nb::shape<-1, block_columns, block_columns>, nb::c_contig, nb::device::cpu>;

void refine(const std::string& format, std::int32_t levels, const Matrix<const float>& weights, const Tiles& tiles,
            int trials, int passes, int threads, const Matrix<std::uint8_t>& blocks) {
    const WeightView weight = view(format, levels, weights, blocks);
    require(extent(tiles, 0) == weight.blocks(), "there must be a tile for each block of a row");
    const int most = checked(threads);
    const Kernel* rounding = chosen_kernel();
    require(rounding != nullptr, "no such kernel");
    nb::gil_scoped_release unlocked;
    refine_blocks(chosen_quantizers(), *rounding, weight, tiles.data(), {trials, passes, true}, most);
}

void measure(const std::string& format, const Matrix<const float>& weights, const SecondMoment& moment, int threads,
             const std::optional<Matrix<std::uint8_t>>& blocks, const Matrix<double>& sums) {
    const BlockFormat* found = find_block_format(format);
    require(found != nullptr, "unknown block format '" + format + "'");
    const WeightView weight =
        blocks ? view(format, found->most_levels, weights, *blocks)
               : WeightView{weights.data(), extent(weights, 0), extent(weights, 1), found, found->most_levels, nullptr};
    require_columns(moment.columns(), weight.columns, "the second moment");
    require(extent(sums, 0) == weight.rows && extent(sums, 1) == 2, "sums have another shape than [rows, 2]");
    static_assert(sizeof(RowMeasures) == 2 * sizeof(double));
    const int most = checked(threads);
    nb::gil_scoped_release unlocked;
    measure_errors(chosen_quantizers(), weight, moment, most, reinterpret_cast<RowMeasures*>(sums.data()));
}

}  // namespace

void bind_quantizers(nb::module_& module) {
    nb::class_<SecondMoment>(module, "SecondMoment")
        .def("__init__", &new_moment, nb::arg("moment").noconvert(), nb::arg("damping"), nb::arg("threads"));
    nb::class_<FeedbackFactor>(module, "FeedbackFactor");
    module.def("feedback_factor", &new_factor, nb::arg("moment").noconvert(), nb::arg("damping"),
               nb::arg("order").noconvert(), nb::arg("threads"));
    module.def("search_scales", &search, nb::arg("format"), nb::arg("levels"), nb::arg("weights").noconvert(),
               nb::arg("importance").noconvert(), nb::arg("by_magnitude"), nb::arg("clips"), nb::arg("rounds"),
               nb::arg("threads"), nb::arg("blocks").noconvert());
    module.def("feed_back_errors", &feedback, nb::arg("format"), nb::arg("levels"), nb::arg("weights").noconvert(),
               nb::arg("factor"), nb::arg("importance").noconvert().none(), nb::arg("given_scales"), nb::arg("clips"),
               nb::arg("rounds"), nb::arg("trials"), nb::arg("threads"), nb::arg("blocks").noconvert());
    module.def("refit_scales", &refit, nb::arg("format"), nb::arg("levels"), nb::arg("weights").noconvert(),
               nb::arg("moment"), nb::arg("ridge"), nb::arg("threads"), nb::arg("blocks").noconvert());
    module.def("descend", &descend_codes, nb::arg("format"), nb::arg("levels"), nb::arg("weights").noconvert(),
               nb::arg("moment"), nb::arg("sweeps"), nb::arg("trials"), nb::arg("passes"), nb::arg("scales"),
               nb::arg("threads"), nb::arg("blocks").noconvert());
    module.def("refine_blocks", &refine, nb::arg("format"), nb::arg("levels"), nb::arg("weights").noconvert(),
               nb::arg("tiles").noconvert(), nb::arg("trials"), nb::arg("passes"), nb::arg("threads"),
               nb::arg("blocks").noconvert());
    module.def("measure_errors", &measure, nb::arg("format"), nb::arg("weights").noconvert(), nb::arg("moment"),
               nb::arg("threads"), nb::arg("blocks").noconvert().none(), nb::arg("sums").noconvert());
}

}  // namespace quantlab::quantizers
