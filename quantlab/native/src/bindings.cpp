// The Python module `_core`: checks numpy arrays and hands them to the block conversions without the interpreter lock.
#include "adapters/adapter_bindings.h"
#include "argument_checks.h"
#include "array_argument.h"
#include "engine/decoder_bindings.h"
#include "engine/file_rows_bindings.h"
#include "engine/sampler_bindings.h"
#include "engine_bindings.h"
#include "instruction_set.h"
#include "matrices.h"
#include "quantizers/quantizer_bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <string>

namespace nb = nanobind;

namespace {

using quantlab::Array;
using quantlab::array_of;
using quantlab::check_shape;
using quantlab::checked_levels;
using quantlab::checked_threads;
using quantlab::fail;
using quantlab::known_format;
using quantlab::known_format_of_own_scales;
using quantlab::listed;

static_assert(sizeof(quantlab::RowSums) == 2 * sizeof(double));

quantlab::Element known_element(const std::string& name) {
    for (std::int32_t i = 0; i < quantlab::element_count; ++i) {
        if (quantlab::element_names[i] == name) {
            return static_cast<quantlab::Element>(i);
        }
    }
    fail("unknown element type '" + name + "'; expected one of " + listed(quantlab::element_names));
}

// The variable comes from the user, so the error is the one that commands print.
[[noreturn]] void fail_for_user(const std::string& message) {
    const nb::object type = nb::module_::import_("quantlab.errors").attr("InputError");
    PyErr_SetString(type.ptr(), message.c_str());
    throw nb::python_error();
}

// Checks the user's choice of an instruction set.
quantlab::InstructionSet instruction_set() {
    if (const auto chosen = quantlab::chosen_instruction_set()) {
        return *chosen;
    }
    const std::string forced = std::getenv(quantlab::kernel_variable);
    std::string fault = "there is no such kernel";
    if (forced == quantlab::name_of(quantlab::InstructionSet::avx2)) {
        fault = "this processor has no AVX2, FMA and F16C";
    } else if (forced == quantlab::name_of(quantlab::InstructionSet::avx512)) {
        fault = "this processor has no AVX-512 F, BW, VL and VNNI";
    }
    fail_for_user(std::string(quantlab::kernel_variable) + "=" + forced + ": " + fault + "; set it to one of " +
                  listed(quantlab::instruction_set_names) + ", or unset it");
}

const quantlab::Kernel& kernel() {
    instruction_set();
    return *quantlab::chosen_kernel();
}

// How many times `unit` goes into `size`, which must be whole.
std::int64_t whole_units(const std::string& subject, std::int64_t size, const char* measure, std::int64_t unit) {
    constexpr std::int64_t most = std::int64_t{1} << 48;  // beyond any memory, and far from overflow
    if (size < 0 || size > most) {
        fail(subject + " cannot have " + std::to_string(size) + " " + measure);
    }
    if (size % unit != 0) {
        fail(subject + " have " + std::to_string(size) + " " + measure + "; expected a multiple of " +
             std::to_string(unit) + ", those of one block");
    }
    return size / unit;
}

std::int64_t row_bytes(const std::string& name, std::int64_t columns) {
    const quantlab::BlockFormat& format = known_format(name);
    return whole_units(name + " weights", columns, "columns", format.block_weights) * format.block_bytes;
}

std::int64_t columns(const std::string& name, std::int64_t row_bytes) {
    const quantlab::BlockFormat& format = known_format(name);
    return whole_units(name + " blocks", row_bytes, "bytes a row", format.block_bytes) * format.block_weights;
}

nb::object as_tuple(const std::optional<quantlab::Position>& position) {
    if (!position) {
        return nb::none();
    }
    return nb::make_tuple(position->row, position->index);
}

// Of rows of raw weights.
quantlab::MatrixShape shape_of(const Array<const std::uint8_t, 2>& weights, quantlab::Element element,
                               const std::string& element_name) {
    const auto width = static_cast<std::int64_t>(weights.shape(1));
    return {static_cast<std::int64_t>(weights.shape(0)),
            whole_units(element_name + " weights", width, "bytes a row", quantlab::element_bytes(element))};
}

nb::tuple quantize(const std::string& name, const std::string& element_name, nb::handle weights_given,
                   std::int64_t levels, std::int64_t threads, nb::handle out_given, nb::handle sums_given) {
    const auto weights = array_of<const std::uint8_t, 2>("weights", weights_given, "[rows, bytes]");
    const auto out = array_of<std::uint8_t, 2>("out", out_given, "[rows, row bytes]");
    std::optional<Array<double, 2>> sums;  // a row's two sums, as RowSums holds them
    if (!sums_given.is_none()) {
        sums = array_of<double, 2>("sums", sums_given, "[rows, 2]");
    }
    const quantlab::BlockFormat& format = known_format_of_own_scales(name);
    const quantlab::Element element = known_element(element_name);
    const quantlab::MatrixShape shape = shape_of(weights, element, element_name);
    check_shape("out", out, shape.rows, row_bytes(name, shape.columns));
    const std::int32_t used_levels = checked_levels(format, levels);
    if (sums) {
        check_shape("sums", *sums, shape.rows, 2);
    }
    auto* row_sums = sums ? reinterpret_cast<quantlab::RowSums*>(sums->data()) : nullptr;
    const quantlab::Kernel& chosen = kernel();
    const int most = checked_threads(threads);
    quantlab::Faults faults;
    {
        nb::gil_scoped_release unlocked;
        faults = quantlab::quantize_matrix(chosen, format, element, weights.data(), shape, used_levels,
                                           most, out.data(), row_sums);
    }
    return nb::make_tuple(as_tuple(faults.not_finite), as_tuple(faults.overflow));
}

void sum_magnitudes(const std::string& element_name, nb::handle weights_given, std::int64_t threads,
                    nb::handle sums_given) {
    const auto weights = array_of<const std::uint8_t, 2>("weights", weights_given, "[rows, bytes]");
    const auto sums = array_of<double, 2>("sums", sums_given, "[rows, blocks a row]");
    const quantlab::Element element = known_element(element_name);
    const quantlab::MatrixShape shape = shape_of(weights, element, element_name);
    constexpr std::int64_t block_weights = quantlab::weights_in<quantlab::BlockTQ2_0>;
    check_shape("sums", sums, shape.rows, whole_units("tq2_0 weights", shape.columns, "columns", block_weights));
    const quantlab::Kernel& chosen = kernel();
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    quantlab::sum_magnitudes(chosen, element, weights.data(), shape, most, sums.data());
}

double ternary_scale(nb::handle sums_given) {
    const auto sums = array_of<const double, 2>("sums", sums_given, "[rows, blocks a row]");
    nb::gil_scoped_release unlocked;
    return quantlab::float_from_half(quantlab::ternary_scale({sums.data(), sums.size()}));
}

// The scale in half precision, if it is such a number.
std::optional<std::uint16_t> checked_scale(std::optional<double> scale) {
    if (!scale) {
        return std::nullopt;
    }
    const std::uint16_t half = quantlab::half_from_float(static_cast<float>(*scale));
    if (!(*scale >= 0.0) || quantlab::float_from_half(half) != *scale || half == quantlab::half_infinity_bits) {
        fail("scale is " + std::to_string(*scale) + "; expected a finite number of half precision, at least 0");
    }
    return half;
}

nb::tuple quantize_ternary(const std::string& element_name, nb::handle weights_given, std::optional<double> scale,
                           std::int64_t threads, nb::handle out_given, nb::handle sums_given) {
    const auto weights = array_of<const std::uint8_t, 2>("weights", weights_given, "[rows, bytes]");
    const auto out = array_of<std::uint8_t, 2>("out", out_given, "[rows, row bytes]");
    std::optional<Array<double, 2>> sums;
    if (!sums_given.is_none()) {
        sums = array_of<double, 2>("sums", sums_given, "[rows, 2]");
    }
    const quantlab::Element element = known_element(element_name);
    const quantlab::MatrixShape shape = shape_of(weights, element, element_name);
    check_shape("out", out, shape.rows, row_bytes("tq2_0", shape.columns));
    if (sums) {
        check_shape("sums", *sums, shape.rows, 2);
    }
    auto* row_sums = sums ? reinterpret_cast<quantlab::RowSums*>(sums->data()) : nullptr;
    const std::optional<std::uint16_t> known = checked_scale(scale);
    const quantlab::Kernel& chosen = kernel();
    const int most = checked_threads(threads);
    quantlab::TernaryTensor tensor;
    {
        nb::gil_scoped_release unlocked;
        tensor = quantlab::quantize_ternary(chosen, element, weights.data(), shape, known, most, out.data(), row_sums);
    }
    return nb::make_tuple(static_cast<double>(quantlab::float_from_half(tensor.scale)), as_tuple(tensor.not_finite));
}

void dequantize(const std::string& name, const std::string& element_name, nb::handle blocks_given,
                std::int64_t threads, nb::handle out_given) {
    const auto blocks = array_of<const std::uint8_t, 2>("blocks", blocks_given, "[rows, row bytes]");
    const auto out = array_of<std::uint8_t, 2>("out", out_given, "[rows, bytes]");
    const quantlab::BlockFormat& format = known_format(name);
    const quantlab::Element element = known_element(element_name);
    const quantlab::MatrixShape shape{static_cast<std::int64_t>(blocks.shape(0)),
                                      columns(name, static_cast<std::int64_t>(blocks.shape(1)))};
    check_shape("out", out, shape.rows, shape.columns * quantlab::element_bytes(element));
    const quantlab::Kernel& chosen = kernel();
    const int most = checked_threads(threads);
    nb::gil_scoped_release unlocked;
    quantlab::dequantize_matrix(chosen, format, element, blocks.data(), shape, most, out.data());
}

}  // namespace

NB_MODULE(_core, module) {
    module.def("quantize", &quantize, nb::arg("format"), nb::arg("element"), nb::arg("weights"),
               nb::arg("levels"), nb::arg("threads"), nb::arg("out"),
               nb::arg("sums").none());
    module.def("dequantize", &dequantize, nb::arg("format"), nb::arg("element"), nb::arg("blocks"),
               nb::arg("threads"), nb::arg("out"));
    module.def("sum_magnitudes", &sum_magnitudes, nb::arg("element"), nb::arg("weights"), nb::arg("threads"),
               nb::arg("sums"));
    module.def("ternary_scale", &ternary_scale, nb::arg("sums"));
    module.def("quantize_ternary", &quantize_ternary, nb::arg("element"), nb::arg("weights"), nb::arg("scale").none(),
               nb::arg("threads"), nb::arg("out"), nb::arg("sums").none());
    module.def("row_bytes", &row_bytes, nb::arg("format"), nb::arg("columns"));
    module.def("columns", &columns, nb::arg("format"), nb::arg("row_bytes"));
    module.def("cpu_kernel", [] { return std::string(quantlab::name_of(instruction_set())); });
    quantlab::register_engine(module);
    quantlab::engine::bind_decoder(module);
    quantlab::quantizers::bind_quantizers(module);
    quantlab::engine::bind_sampler(module);
    quantlab::engine::bind_file_rows(module);
    quantlab::adapters::bind_adapters(module);
}
