// dlms_engine._C: the history ring and the sampling loop for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/graph_bindings.h"
#include "sampling_loop.h"

namespace py = pybind11;
using dlms::HistoryRing;
using dlms::SamplingLoop;

PYBIND11_MODULE(_C, m) {
  m.doc() = "History ring and sampling loop on the CPU; captured runs on a GPU.";
  m.def(
      "cpu_isa", [] { return dlms::kernels().name; },
      "Instruction set of the CPU kernels in use: 'baseline', 'avx2' or 'avx512'.");

  py::class_<HistoryRing>(m, "HistoryRing",
      "The last `depth` values of m in one tensor [depth, B, ...], rotated by index.")
      .def(py::init<int64_t, const std::vector<int64_t>&, py::object>(), py::arg("depth"),
          py::arg("shape"), py::arg("dtype"))
      .def_property_readonly("tensor", &HistoryRing::tensor, "The memory, [depth, B, ...].")
      .def_property_readonly("depth", &HistoryRing::depth)
      .def_property_readonly(
          "newest", &HistoryRing::newest, "Slot written last, -1 before the first.")
      .def_property_readonly("next_slot", &HistoryRing::next_slot, "Slot that is written next.")
      .def(
          "push",
          [](HistoryRing& ring, const py::object& m) {
            const int64_t slot = ring.next_slot();
            ring.tensor()[py::int_(slot)].attr("copy_")(m);
            ring.wrote(slot);
          },
          py::arg("m"), "Copy m, [B, ...], over the oldest value.")
      .def("past", &HistoryRing::past, py::arg("k"),
          "m_{n-k}, a view [B, ...]; IndexError before anything was written.")
      .def("reset", &HistoryRing::reset, "Forget what was written; the memory stays.");

  py::class_<SamplingLoop>(m, "SamplingLoop",
      "Runs rows on one shape and dtype; allocates at construction and not again.")
      .def(py::init<int64_t, const std::vector<int64_t>&, py::object, py::object>(),
          py::arg("depth"), py::arg("shape"), py::arg("state_dtype"), py::arg("network_dtype"))
      .def("start", &SamplingLoop::start, py::arg("x"), py::arg("c_in"),
          "Copy x, [B, ...], into the state and write the first network input, c_in * x.")
      .def("step", &SamplingLoop::step, py::arg("f"), py::arg("f_cond"), py::arg("row"),
          "One row, [R] or [B, R], on the network's output f (and f_cond, or None).")
      .def("run", &SamplingLoop::run, py::arg("x"), py::arg("c_in"), py::arg("rows"),
          py::arg("network"), py::arg("row_fn") = py::none(), py::arg("callback") = py::none(),
          "Start, then for every row: network(n, network_input), the row, callback(n, state).")
      .def_property_readonly("state", &SamplingLoop::state, "The live state, [B, ...].")
      .def_property_readonly(
          "network_input", &SamplingLoop::network_input, "The live network input, [B, ...].")
      .def_property_readonly(
          "ring", &SamplingLoop::ring, py::return_value_policy::reference_internal);

  dlms::bind_graphs(m);
}
