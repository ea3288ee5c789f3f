// The engine's linear algebra for tests and benchmarks: packed matrices, threads, activations in int8.
//
// Callers have checked the user's choice of an instruction set (`cpu_kernel`).
#include "engine_bindings.h"

#include "argument_checks.h"
#include "array_argument.h"
#include "engine/packed_matrix.h"
#include "engine/thread_pool.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <string>

namespace nb = nanobind;

namespace quantlab {

namespace {

using engine::ActivationScheme;
using engine::PackedMatrix;
using engine::ThreadPool;
using engine::Tokens;
using engine::WeightType;

template <typename Element>
using Matrix = Array<Element, 2>;

constexpr const char* type_names[engine::weight_type_count] = {"f32",  "f16",  "bf16", "q4_0", "q4_1",
                                                               "q5_0", "q5_1", "q8_0", "tq2_0"};

WeightType known_type(const std::string& name) {
    for (int i = 0; i < engine::weight_type_count; ++i) {
        if (name == type_names[i]) {
            return static_cast<WeightType>(i);
        }
    }
    fail("unknown weight type '" + name + "'; expected one of " + listed(type_names));
}

int count_of(const char* subject, std::size_t count) {
    require(count <= static_cast<std::size_t>(std::numeric_limits<int>::max()),
            std::string(subject) + " has " + std::to_string(count) + " rows: too many");
    return static_cast<int>(count);
}

int checked_columns(std::int64_t columns, int unit) {
    require(columns <= std::numeric_limits<int>::max(), std::to_string(columns) + " columns are too many");
    require(columns % unit == 0, std::to_string(columns) + " columns are not a multiple of " + std::to_string(unit));
    return static_cast<int>(columns);
}

PackedMatrix* new_matrix(PackedMatrix* place, const std::string& type_name, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t most = std::numeric_limits<int>::max() / 2;
    const WeightType type = known_type(type_name);
    const std::string expected = "; expected 1 to " + std::to_string(most);
    require(rows >= 1 && rows <= most, "a matrix cannot have " + std::to_string(rows) + " rows" + expected);
    require(columns >= 1 && columns <= most, "a matrix cannot have " + std::to_string(columns) + " columns" + expected);
    checked_columns(columns, engine::columns_unit(type));
    return new (place) PackedMatrix(type, rows, columns);
}

void fill(PackedMatrix& matrix, std::int64_t first_row, nb::handle rows_given) {
    const auto rows = array_of<const std::uint8_t, 2>("rows", rows_given, "[rows, row bytes]");
    const auto count = static_cast<std::int64_t>(rows.shape(0));
    check_shape("rows", rows, count, engine::file_row_bytes(matrix.type(), matrix.columns()));
    require(first_row >= 0 && count <= matrix.rows() - first_row,
            "no rows " + std::to_string(first_row) + " to " + std::to_string(first_row + count) + " in a matrix of " +
                std::to_string(matrix.rows()));
    nb::gil_scoped_release unlocked;
    matrix.fill(first_row, count, rows.data());
}

void multiply(const PackedMatrix& matrix, ThreadPool& pool, const Tokens& x, const Matrix<float>& out, int first_group,
              int last_group) {
    check_shape("out", out, x.count, matrix.rows());
    require(first_group >= 0 && first_group <= last_group && last_group <= matrix.groups(),
            "no groups " + std::to_string(first_group) + " to " + std::to_string(last_group) + " in a matrix of " +
                std::to_string(matrix.groups()));
    nb::gil_scoped_release unlocked;
    pool.run([&](int thread) {
        const std::int64_t groups = last_group - first_group;
        const auto first = first_group + static_cast<int>(groups * thread / pool.size());
        const auto last = first_group + static_cast<int>(groups * (thread + 1) / pool.size());
        matrix.multiply(x, out.data(), matrix.rows(), first, last);
    });
}

void multiply_values(const PackedMatrix& matrix, ThreadPool& pool, nb::handle values_given, nb::handle out_given,
                     int first_group, int last_group) {
    const auto values = array_of<const float, 2>("values", values_given, "[tokens, columns]");
    const auto out = array_of<float, 2>("out", out_given, "[tokens, rows]");
    const int count = count_of("values", values.shape(0));
    check_shape("values", values, count, matrix.columns());
    const Tokens x{count, static_cast<int>(matrix.columns()), values.data()};
    multiply(matrix, pool, x, out, first_group, last_group);
}

void multiply_codes(const PackedMatrix& matrix, ThreadPool& pool, nb::handle codes_given, nb::handle scales_given,
                    nb::handle sums_given, nb::handle out_given, int first_group, int last_group) {
    const auto codes = array_of<const std::int8_t, 2>("codes", codes_given, "[tokens, columns]");
    const auto scales = array_of<const float, 2>("scales", scales_given, "[tokens, scales]");
    const auto sums = array_of<const float, 2>("sums", sums_given, "[tokens, sums]");
    const auto out = array_of<float, 2>("out", out_given, "[tokens, rows]");
    require(engine::is_quantized(matrix.type()), "codes multiply quantized weights only");
    const int count = count_of("codes", codes.shape(0)), columns = static_cast<int>(matrix.columns());
    const ActivationScheme scheme = engine::activation_scheme(matrix.type());
    check_shape("codes", codes, count, columns);
    check_shape("scales", scales, count, engine::scales_per_token(scheme, columns));
    check_shape("sums", sums, count, engine::sums_per_token(scheme, columns));
    const std::int8_t* end = codes.data() + codes.size();
    require(std::find(codes.data(), end, std::numeric_limits<std::int8_t>::min()) == end, "a code is -128");
    Tokens x{count, columns, nullptr};
    (scheme == ActivationScheme::token ? x.by_token : x.by_block) = {codes.data(), scales.data(), sums.data()};
    multiply(matrix, pool, x, out, first_group, last_group);
}

void read_row(const PackedMatrix& matrix, std::int64_t row, nb::handle out_given) {
    const auto out = array_of<float, 2>("out", out_given, "[1, columns]");
    require(row >= 0 && row < matrix.rows(),
            "no row " + std::to_string(row) + " in a matrix of " + std::to_string(matrix.rows()));
    check_shape("out", out, 1, matrix.columns());
    matrix.read_row(row, out.data());
}

// Rounds activations to int8 by block (quantize_token) or by token (quantize_row).
template <ActivationScheme scheme>
void quantize_tokens(nb::handle values_given, nb::handle codes_given, nb::handle scales_given, nb::handle sums_given) {
    constexpr bool by_token = scheme == ActivationScheme::token;
    const auto values = array_of<const float, 2>("values", values_given, "[tokens, columns]");
    const auto codes = array_of<std::int8_t, 2>("codes", codes_given, "[tokens, columns]");
    const auto scales = array_of<float, 2>("scales", scales_given, "[tokens, scales]");
    const auto sums = array_of<float, 2>("sums", sums_given, "[tokens, sums]");
    const auto count = static_cast<std::int64_t>(values.shape(0));
    const int columns = checked_columns(static_cast<std::int64_t>(values.shape(1)),
                                        by_token ? engine::ternary_columns : engine::block_columns);
    const int token_scales = engine::scales_per_token(scheme, columns);
    const int token_sums = engine::sums_per_token(scheme, columns);
    check_shape("codes", codes, count, columns);
    check_shape("scales", scales, count, token_scales);
    check_shape("sums", sums, count, token_sums);
    for (std::int64_t t = 0; t < count; ++t) {
        (by_token ? engine::quantize_row : engine::quantize_token)(
            values.data() + t * columns, columns, codes.data() + t * columns, scales.data() + t * token_scales,
            sums.data() + t * token_sums);
    }
}

// Reads memory as fast as can be, each thread a part of it in four places at once, and does next to nothing with it:
// the ruler for multiplications.
std::uint64_t read_memory(ThreadPool& pool, nb::handle bytes_given) {
    const auto bytes = array_of<const std::uint8_t, 2>("bytes", bytes_given, "[rows, bytes]");
    require(reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(std::uint64_t) == 0,
            "bytes must begin at a multiple of 8");
    constexpr std::int64_t places = 4;
    constexpr std::int64_t words = 4;  // taken from a place at a time
    const auto* memory = reinterpret_cast<const std::uint64_t*>(bytes.data());
    const std::int64_t share = static_cast<std::int64_t>(bytes.size()) / 8 / pool.size();
    const std::int64_t run = share / places / words * words;
    std::atomic<std::uint64_t> total = 0;
    nb::gil_scoped_release unlocked;
    pool.run([&](int thread) {
        std::uint64_t sums[places][words] = {};
        for (std::int64_t i = thread * share; i < thread * share + run; i += words) {
            for (std::int64_t place = 0; place < places; ++place) {
                for (std::int64_t word = 0; word < words; ++word) {
                    sums[place][word] ^= memory[i + place * run + word];
                }
            }
        }
        for (const auto& of_place : sums) {
            for (const std::uint64_t sum : of_place) {
                total ^= sum;
            }
        }
    });
    return total;
}

ThreadPool* new_pool(ThreadPool* place, int threads) {
    require(threads >= 1 && threads <= 1024, "cannot use " + std::to_string(threads) + " threads; expected 1 to 1024");
    return new (place) ThreadPool(threads);
}

}  // namespace

void register_engine(nb::module_& module) {
    nb::class_<ThreadPool>(module, "ThreadPool")
        .def("__init__", [](ThreadPool* place, int threads) { new_pool(place, threads); }, nb::arg("threads"))
        .def_prop_ro("size", &ThreadPool::size);
    nb::class_<PackedMatrix>(module, "PackedMatrix")
        .def(
            "__init__",
            [](PackedMatrix* place, const std::string& type, std::int64_t rows, std::int64_t columns) {
                new_matrix(place, type, rows, columns);
            },
            nb::arg("type"), nb::arg("rows"), nb::arg("columns"))
        .def_prop_ro("groups", &PackedMatrix::groups)
        .def_prop_ro("bytes", [](const PackedMatrix& matrix) { return matrix.groups() * matrix.group_bytes(); })
        .def("fill", &fill, nb::arg("first_row"), nb::arg("rows"))
        .def("multiply_values", &multiply_values, nb::arg("pool"), nb::arg("values"),
             nb::arg("out"), nb::arg("first_group"), nb::arg("last_group"))
        .def("multiply_codes", &multiply_codes, nb::arg("pool"), nb::arg("codes"),
             nb::arg("scales"), nb::arg("sums"), nb::arg("out"),
             nb::arg("first_group"), nb::arg("last_group"))
        .def("read_row", &read_row, nb::arg("row"), nb::arg("out"));
    module.def("read_memory", &read_memory, nb::arg("pool"), nb::arg("bytes"));
    module.def("quantize_tokens", &quantize_tokens<ActivationScheme::block>, nb::arg("values"), nb::arg("codes"),
               nb::arg("scales"), nb::arg("sums"));
    module.def("quantize_rows", &quantize_tokens<ActivationScheme::token>, nb::arg("values"), nb::arg("codes"),
               nb::arg("scales"), nb::arg("sums"));
}

}  // namespace quantlab
