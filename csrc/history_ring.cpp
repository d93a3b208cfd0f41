#include "history_ring.h"

#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "fused_row.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace dlms {

HistoryRing::HistoryRing(int64_t depth, const std::vector<int64_t>& shape, py::object dtype) {
  if (depth < 1 || depth > kMaxDepth)
    throw py::value_error(
        "depth is " + std::to_string(depth) + ", expected 1 to " + std::to_string(kMaxDepth));
  std::vector<int64_t> full = {depth};
  full.insert(full.end(), shape.begin(), shape.end());
  *this = HistoryRing(
      py::module_::import("torch").attr("empty")(full, py::arg("dtype") = std::move(dtype)));
}

HistoryRing::HistoryRing(py::object tensor) : tensor_(std::move(tensor)) {
  const TensorView view = view_of(tensor_, "ring");
  data_ = view.data;
  depth_ = view.shape[0];
}

py::object HistoryRing::past(int64_t k) const {
  if (k < 0 || k >= depth_ || newest_ < 0)
    throw py::index_error("m_{n-" + std::to_string(k) + "} of a ring of " + std::to_string(depth_) +
                          (newest_ < 0 ? " slots that holds nothing yet" : " slots"));
  return tensor_[py::int_((newest_ - k + depth_) % depth_)];
}

} // namespace dlms
