// The quantizers' part of the Python module: see quantizer_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab::quantizers {

void bind_quantizers(nanobind::module_& module);

}  // namespace quantlab::quantizers
