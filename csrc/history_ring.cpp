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
  const Dtype type = dtype_from_python(dtype, "dtype");
  (void)checked_bytes(shape, type); // names the shape as it was given
  slots_ = LiveTensor(allocate_pages(checked_bytes(full, type)), 0, full, type);
}

py::object HistoryRing::past(int64_t k) {
  if (k < 0 || k >= depth() || newest_ < 0)
    throw py::index_error("m_{n-" + std::to_string(k) + "} of a ring of " +
                          std::to_string(depth()) +
                          (newest_ < 0 ? " slots that holds nothing yet" : " slots"));
  return tensor()[py::int_((newest_ - k + depth()) % depth())];
}

} // namespace dlms
