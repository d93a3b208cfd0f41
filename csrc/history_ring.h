// The history ring: the last `depth` values of m, written in place and rotated by index.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "live_tensor.h"

namespace dlms {

// History of the last `depth` values of m in one tensor [depth, B, ...], rotated by index: a value
// is written once and never moved.
class HistoryRing {
 public:
  HistoryRing(int64_t depth, const std::vector<int64_t>& shape, pybind11::object dtype);
  // Over memory that the loop has allocated; slots: [depth, B, ...].
  explicit HistoryRing(LiveTensor slots) : slots_(std::move(slots)) {}

  const pybind11::object& tensor() { return slots_.tensor(); }
  void* data() const { return slots_.data(); }
  int64_t depth() const { return slots_.shape()[0]; }
  int64_t newest() const { return newest_; } // slot written last, -1 before the first
  void wrote(int64_t slot) { newest_ = slot; }
  void reset() { newest_ = -1; }
  int64_t next_slot() const { return (newest_ + 1) % depth(); }
  // m_{n-k} as a view of the ring; IndexError before anything was written.
  pybind11::object past(int64_t k);

 private:
  LiveTensor slots_;
  int64_t newest_ = -1;
};

} // namespace dlms
