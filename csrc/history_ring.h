// The history ring: the last `depth` values of m, written in place and rotated by index.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace dlms {

// History of the last `depth` values of m in one tensor [depth, B, ...], rotated by index: a value
// is written once and never moved.
class HistoryRing {
 public:
  HistoryRing(int64_t depth, const std::vector<int64_t>& shape, pybind11::object dtype);
  // Over memory that the loop has allocated.
  explicit HistoryRing(pybind11::object tensor);

  const pybind11::object& tensor() const { return tensor_; }
  void* data() const { return data_; }
  int64_t depth() const { return depth_; }
  int64_t newest() const { return newest_; } // slot written last, -1 before the first
  void wrote(int64_t slot) { newest_ = slot; }
  void reset() { newest_ = -1; }
  int64_t next_slot() const { return (newest_ + 1) % depth_; }
  // m_{n-k} as a view of the ring; IndexError before anything was written.
  pybind11::object past(int64_t k) const;

 private:
  pybind11::object tensor_;
  void* data_ = nullptr;
  int64_t depth_ = 0;
  int64_t newest_ = -1;
};

} // namespace dlms
