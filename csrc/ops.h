// Binds the CPU kernels behind stars_fast.ops to the Python module.
#pragma once

#include <pybind11/pybind11.h>

void bind_ops(pybind11::module_& m);
