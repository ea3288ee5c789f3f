// The part of the Python module for low-rank updates: see adapter_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab::adapters {

void bind_adapters(nanobind::module_& module);

}  // namespace quantlab::adapters
