// The Python door of multiplication by rows in the file's layout: shapes are checked, the interpreter is free meanwhile.
//
// Callers have checked the user's choice of an instruction set (`cpu_kernel`).
#include "file_rows_bindings.h"

#include "../argument_checks.h"
#include "../array_argument.h"
#include "file_rows.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <limits>
#include <string>

namespace nb = nanobind;

namespace quantlab::engine {

namespace {

constexpr std::int64_t most = std::numeric_limits<int>::max() / 16;  // tokens or columns: far from overflow
const std::string expected_at_most = "; expected at most " + std::to_string(most);

template <typename Element>
using Matrix = Array<Element, 2>;

FileRows checked_rows(const std::string& format_name, const Matrix<const std::uint8_t>& blocks) {
    const BlockFormat& format = known_format(format_name);
    const auto type = static_cast<WeightType>(static_cast<int>(WeightType::q4_0) + format.index);  // the same order
    const auto row_bytes = static_cast<std::int64_t>(blocks.shape(1));
    const std::int64_t block_bytes = format.block_bytes, columns = row_bytes / block_bytes * columns_unit(type);
    require(row_bytes > 0 && row_bytes % block_bytes == 0, format_name + " blocks have " + std::to_string(row_bytes) +
                                                               " bytes a row; expected a multiple of " +
                                                               std::to_string(block_bytes) + ", those of one block");
    require(columns <= most, "a matrix cannot have " + std::to_string(columns) + " columns" + expected_at_most);
    return {type, static_cast<std::int64_t>(blocks.shape(0)), static_cast<int>(columns), blocks.data()};
}

void multiply_rows(ThreadPool& pool, const std::string& format, nb::handle blocks_given, nb::handle values_given,
                   nb::handle out_given) {
    const auto blocks = array_of<const std::uint8_t, 2>("blocks", blocks_given, "[rows, row bytes]");
    const auto values = array_of<const float, 2>("values", values_given, "[tokens, columns]");
    const auto out = array_of<float, 2>("out", out_given, "[tokens, rows]");
    const FileRows weights = checked_rows(format, blocks);
    const std::size_t count = values.shape(0);
    require(count <= static_cast<std::size_t>(most),
            "cannot multiply " + std::to_string(count) + " tokens at once" + expected_at_most);
    check_shape("values", values, static_cast<std::int64_t>(count), weights.columns);
    check_shape("out", out, static_cast<std::int64_t>(count), weights.rows);
    nb::gil_scoped_release unlocked;
    multiply_file_rows(weights, values.data(), static_cast<int>(count), out.data(), pool);
}

}  // namespace

void bind_file_rows(nb::module_& module) {
    module.def("multiply_file_rows", &multiply_rows, nb::arg("pool"), nb::arg("format"), nb::arg("blocks").none(),
               nb::arg("values").none(), nb::arg("out").none());
}

}  // namespace quantlab::engine
