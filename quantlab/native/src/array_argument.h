// An array from Python, refused by name where it is not what the core computes with. Nothing is ever copied: a copy of
// an output would be lost, and a copy of weights unseen.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace quantlab {

// Row-major without gaps, in the processor's memory; of const elements it may be read-only.
template <typename Element, std::size_t dims>
using Array = nanobind::ndarray<Element, nanobind::ndim<dims>, nanobind::c_contig, nanobind::device::cpu>;

namespace array_argument {

template <typename Element>
constexpr const char* element_name() {
    using Plain = std::remove_const_t<Element>;
    if constexpr (std::is_same_v<Plain, float>) return "float32";
    if constexpr (std::is_same_v<Plain, double>) return "float64";
    if constexpr (std::is_same_v<Plain, std::int32_t>) return "int32";
    if constexpr (std::is_same_v<Plain, std::int8_t>) return "int8";
    if constexpr (std::is_same_v<Plain, std::uint8_t>) return "uint8";
}

// As Python would print it: "float64 [2, 32], not contiguous", or the name of a type that is no array.
inline std::string found(nanobind::handle given) {
    namespace nb = nanobind;
    try {
        if (!nb::hasattr(given, "dtype") || !nb::hasattr(given, "shape")) {
            return nb::str(given.type().attr("__name__")).c_str();
        }
        const nb::object dtype = given.attr("dtype"), extents = given.attr("shape");
        std::string text = std::string(nb::str(dtype).c_str()) + " " + nb::str(nb::list(extents)).c_str();
        if (nb::hasattr(given, "flags") && nb::hasattr(given.attr("flags"), "c_contiguous")) {
            const nb::object flags = given.attr("flags");
            text += nb::cast<bool>(flags.attr("c_contiguous")) ? "" : ", not contiguous";
            text += nb::cast<bool>(flags.attr("writeable")) ? "" : ", read-only";
        }
        return text;
    } catch (const std::exception&) {
        return "an object that does not tell what it is";
    }
}

template <typename Element>
[[noreturn]] void refuse(const char* name, const char* axes, const std::string& given) {
    const std::string writable = std::is_const_v<Element> ? "" : "writable ";
    const std::string message = std::string(name) + ": expected a " + writable + "C-contiguous array of " +
                                element_name<Element>() + " " + axes + " in the processor's memory, got " + given;
    throw nanobind::type_error(message.c_str());
}

}  // namespace array_argument

// `axes` is what messages say of the shape, such as "[tokens, columns]". Throws Python's TypeError.
template <typename Element, std::size_t dims>
Array<Element, dims> array_of(const char* name, nanobind::handle given, const char* axes) {
    Array<Element, dims> array;
    if (!nanobind::try_cast(given, array, false)) {
        array_argument::refuse<Element>(name, axes, array_argument::found(given));
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(Element) != 0) {
        array_argument::refuse<Element>(name, axes, "one whose address is no multiple of " + std::to_string(alignof(Element)));
    }
    return array;
}

}  // namespace quantlab
