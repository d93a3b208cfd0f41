// Captured runs for Python: dlms_engine._C.GraphRun, GraphCache, GraphKey and their functions.
#pragma once

#include <pybind11/pybind11.h>

namespace dlms {
void bind_graphs(pybind11::module_& module);
}
