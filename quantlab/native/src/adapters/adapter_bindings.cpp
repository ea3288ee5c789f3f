// Checks shapes and hands arrays to the low-rank updates without the interpreter lock; quantlab/native/adapters.py is
// the door for Python. Nothing is written before all has been checked.
#include "adapter_bindings.h"

#include "../argument_checks.h"
#include "../array_argument.h"
#include "updates.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

namespace nb = nanobind;

namespace quantlab::adapters {

namespace {

// A and B, kept alive while the core works with them.
struct HeldUpdate {
    Array<const float, 2> a;
    Array<const float, 2> b;
    LowRank view;
};

std::int64_t extent(const auto& array, std::size_t axis) { return static_cast<std::int64_t>(array.shape(axis)); }

HeldUpdate held(nb::handle a_given, nb::handle b_given, float scale) {
    auto a = array_of<const float, 2>("a", a_given, "[rank, columns]");
    auto b = array_of<const float, 2>("b", b_given, "[rows, rank]");
    const LowRank view{a.data(), b.data(), scale, extent(b, 0), extent(a, 1), extent(a, 0)};
    check_shape("b", b, view.rows, view.rank);
    require(std::isfinite(scale), "scale must be a finite number of single precision");
    return {std::move(a), std::move(b), view};
}

void check_finite_update(const UpdateKernel& kernel, const LowRank& update, int threads) {
    std::optional<Position> found;
    {
        nb::gil_scoped_release unlocked;
        found = first_not_finite(kernel, update, threads);
    }
    if (found) {
        fail("scale * b @ a is NaN or infinite at [" + std::to_string(found->row) + ", " +
             std::to_string(found->index) + "]; expected finite numbers");
    }
}

void low_rank_product(nb::handle a, nb::handle b, float scale, std::int64_t threads, nb::handle out_given) {
    const HeldUpdate update = held(a, b, scale);
    const auto out = array_of<float, 2>("out", out_given, "[rows, columns]");
    check_shape("out", out, update.view.rows, update.view.columns);
    const int most = checked_threads(threads);
    const UpdateKernel& kernel = chosen_updates();
    check_finite_update(kernel, update.view, most);
    nb::gil_scoped_release unlocked;
    multiply(kernel, update.view, most, out.data());
}

// Without levels (None), the format's own.
void rechoose(const std::string& format_name, std::optional<std::int64_t> levels, nb::handle blocks_given, nb::handle a,
              nb::handle b, float scale, std::int64_t threads, nb::handle out_given) {
    const auto blocks = array_of<const std::uint8_t, 2>("blocks", blocks_given, "[rows, row bytes]");
    const auto out = array_of<std::uint8_t, 2>("out", out_given, "[rows, row bytes]");
    const BlockFormat& format = known_format_of_own_scales(format_name);
    const std::int32_t used = checked_levels(format, levels.value_or(format.most_levels));
    const HeldUpdate update = held(a, b, scale);
    const std::int64_t columns = update.view.columns;
    require(columns % weights_per_block == 0,
            "a has " + std::to_string(columns) + " columns; expected a multiple of 32");
    const std::int64_t row_bytes = columns / weights_per_block * format.block_bytes;
    check_shape("blocks", blocks, update.view.rows, row_bytes);
    check_shape("out", out, update.view.rows, row_bytes);
    const int most = checked_threads(threads);
    const UpdateKernel& kernel = chosen_updates();
    check_finite_update(kernel, update.view, most);
    nb::gil_scoped_release unlocked;
    rechoose_codes(kernel, format, used, update.view, most, blocks.data(), out.data());
}

}  // namespace

// Arrays may be None here, so that it is `array_of` that refuses it, by the argument's name.
void bind_adapters(nb::module_& module) {
    module.def("low_rank_product", &low_rank_product, nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale"),
               nb::arg("threads"), nb::arg("out").none());
    module.def("rechoose_codes", &rechoose, nb::arg("format"), nb::arg("levels").none(), nb::arg("blocks").none(),
               nb::arg("a").none(), nb::arg("b").none(), nb::arg("scale"), nb::arg("threads"), nb::arg("out").none());
}

}  // namespace quantlab::adapters
