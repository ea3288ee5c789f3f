// The engine's part of the Python module: see engine_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab {

void register_engine(nanobind::module_& module);

}  // namespace quantlab
