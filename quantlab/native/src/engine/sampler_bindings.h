// The sampler's part of the Python module: see sampler_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab::engine {

void bind_sampler(nanobind::module_& module);

}  // namespace quantlab::engine
