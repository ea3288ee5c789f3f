// The decoder's part of the Python module: see decoder_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab::engine {

void bind_decoder(nanobind::module_& module);

}  // namespace quantlab::engine
