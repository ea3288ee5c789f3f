// What the doors for Python check besides arrays: each refusal is a ValueError that names the argument.
#pragma once

#include "array_argument.h"
#include "blocks.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>

namespace quantlab {

[[noreturn]] inline void fail(const std::string& message) { throw nanobind::value_error(message.c_str()); }

inline void require(bool condition, const std::string& message) {
    if (!condition) {
        fail(message);
    }
}

// "one, two, three"
template <typename Names>
std::string listed(const Names& names) {
    std::string list;
    for (const auto& name : names) {
        list += (list.empty() ? "" : ", ") + std::string(name);
    }
    return list;
}

inline const BlockFormat& known_format(const std::string& name) {
    if (const BlockFormat* format = find_block_format(name)) {
        return *format;
    }
    std::string names[format_count];
    for (const BlockFormat& format : block_formats()) {
        names[format.index] = format.name;
    }
    fail("unknown block format '" + name + "'; expected one of " + listed(names));
}

// One whose blocks can be changed one by one.
inline const BlockFormat& known_format_of_own_scales(const std::string& name) {
    const BlockFormat& format = known_format(name);
    require(format.has_own_scales(), name + " has one scale a tensor; expected a format whose blocks have their own");
    return format;
}

inline std::int32_t checked_levels(const BlockFormat& format, std::int64_t levels) {
    if (levels < format.fewest_levels || levels > format.most_levels) {
        fail(std::string(format.name) + " cannot use " + std::to_string(levels) + " levels; expected " +
             std::to_string(format.fewest_levels) + " to " + std::to_string(format.most_levels));
    }
    return static_cast<std::int32_t>(levels);
}

// More threads than any machine profits from count as so many.
inline int checked_threads(std::int64_t threads) {
    constexpr std::int64_t most = 1024;
    if (threads < 1) {
        fail("cannot use " + std::to_string(threads) + " threads; expected at least 1");
    }
    return static_cast<int>(std::min(threads, most));
}

inline int checked_number(const char* name, std::int64_t number, int least, int most) {
    if (number < least || number > most) {
        fail(std::string(name) + " is " + std::to_string(number) + "; expected " + std::to_string(least) + " to " +
             std::to_string(most));
    }
    return static_cast<int>(number);
}

template <typename Array>
void check_shape(const char* name, const Array& array, std::int64_t rows, std::int64_t columns) {
    const auto held_rows = static_cast<std::int64_t>(array.shape(0));
    const auto held_columns = static_cast<std::int64_t>(array.shape(1));
    if (held_rows != rows || held_columns != columns) {
        fail(std::string(name) + " has shape [" + std::to_string(held_rows) + ", " + std::to_string(held_columns) +
             "]; expected [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
    }
}

// Names the first element that is NaN or infinite.
template <typename Floats>
void check_finite(const char* name, const Floats& array) {
    constexpr std::uint32_t exponent = 0x7f800000;
    const auto is_finite = [](float value) { return (std::bit_cast<std::uint32_t>(value) & exponent) != exponent; };
    const float* begin = array.data();
    const float* end = begin + array.size();
    bool all = true;
    for (const float* value = begin; value != end; ++value) {  // without a way out, so that compilers vectorize it
        all &= is_finite(*value);
    }
    if (all) {
        return;
    }
    const float* found = std::find_if_not(begin, end, is_finite);
    std::string place;
    std::size_t rest = static_cast<std::size_t>(found - begin);
    for (std::size_t axis = array.ndim(); axis-- > 0; rest /= array.shape(axis)) {
        place = std::to_string(rest % array.shape(axis)) + (place.empty() ? "" : ", ") + place;
    }
    fail(std::string(name) + " is " + (std::isnan(*found) ? "NaN" : "infinite") + " at [" + place +
         "]; expected finite numbers");
}

}  // namespace quantlab
