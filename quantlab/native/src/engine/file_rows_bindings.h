// Multiplication by rows in the file's layout, for Python: see file_rows_bindings.cpp.
#pragma once

#include <nanobind/nanobind.h>

namespace quantlab::engine {

void bind_file_rows(nanobind::module_& module);

}  // namespace quantlab::engine
