// The Python module `_core`: checks numpy arrays and hands them to the block conversions without the interpreter lock.
#include "blocks.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace nb = nanobind;

namespace {

using Weights = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

template <typename Scalar>
using Matrix = nb::ndarray<nb::numpy, Scalar, nb::ndim<2>>;

[[noreturn]] void fail(const std::string& message) { throw nb::value_error(message.c_str()); }

const quantlab::BlockFormat& known_format(const std::string& name) {
    if (const quantlab::BlockFormat* format = quantlab::find_block_format(name)) {
        return *format;
    }
    std::string known;
    for (const quantlab::BlockFormat& format : quantlab::block_formats()) {
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    fail("unknown block format '" + name + "'; expected one of " + known);
}

// How many times `unit` goes into `size`, which must be whole.
std::size_t whole_units(const std::string& subject, std::size_t size, const char* measure, std::size_t unit) {
    if (size % unit != 0) {
        fail(subject + " have " + std::to_string(size) + " " + measure + "; expected a multiple of " +
             std::to_string(unit) + ", those of one block");
    }
    return size / unit;
}

void check_levels(const quantlab::BlockFormat& format, std::int64_t levels) {
    if (levels < format.fewest_levels || levels > format.most_levels) {
        fail(std::string(format.name) + " cannot use " + std::to_string(levels) + " levels; expected " +
             std::to_string(format.fewest_levels) + " to " + std::to_string(format.most_levels));
    }
}

// A new numpy array that owns `values`.
template <typename Scalar>
Matrix<Scalar> matrix(std::unique_ptr<Scalar[]> values, std::size_t rows, std::size_t columns) {
    nb::capsule owner(values.get(), [](void* memory) noexcept { delete[] static_cast<Scalar*>(memory); });
    return Matrix<Scalar>(values.release(), {rows, columns}, owner);
}

Matrix<std::uint8_t> quantize(const std::string& name, const Weights& weights, std::int64_t levels) {
    const quantlab::BlockFormat& format = known_format(name);
    const std::size_t rows = weights.shape(0);
    const std::size_t row_blocks =
        whole_units(name + " weights", weights.shape(1), "columns", quantlab::weights_per_block);
    check_levels(format, levels);
    const std::size_t row_bytes = row_blocks * static_cast<std::size_t>(format.block_bytes);
    std::unique_ptr<std::uint8_t[]> bytes(new std::uint8_t[rows * row_bytes]);
    {
        nb::gil_scoped_release unlocked;
        format.quantize(weights.data(), static_cast<std::int64_t>(rows * row_blocks),
                        static_cast<std::int32_t>(levels), bytes.get());
    }
    return matrix(std::move(bytes), rows, row_bytes);
}

Matrix<float> dequantize(const std::string& name, const Bytes& blocks) {
    const quantlab::BlockFormat& format = known_format(name);
    const std::size_t rows = blocks.shape(0);
    const std::size_t row_blocks = whole_units(name + " blocks", blocks.shape(1), "bytes a row",
                                               static_cast<std::size_t>(format.block_bytes));
    const std::size_t columns = row_blocks * quantlab::weights_per_block;
    std::unique_ptr<float[]> weights(new float[rows * columns]);
    {
        nb::gil_scoped_release unlocked;
        format.dequantize(blocks.data(), static_cast<std::int64_t>(rows * row_blocks), weights.get());
    }
    return matrix(std::move(weights), rows, columns);
}

}  // namespace

NB_MODULE(_core, module) {
    // noconvert: an array of another type or layout is an error, not a silent copy.
    module.def("quantize", &quantize, nb::arg("format"), nb::arg("weights").noconvert(), nb::arg("levels"));
    module.def("dequantize", &dequantize, nb::arg("format"), nb::arg("blocks").noconvert());
}
