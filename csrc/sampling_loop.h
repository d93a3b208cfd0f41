// The sampling loop: the state, the next network input and the history ring in one allocation made
// at construction, and a loop over rows that touches Python only to call the network.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fused_row.h"
#include "history_ring.h"
#include "live_tensor.h"
#include "tensor_view.h"

namespace dlms {

class SamplingLoop {
 public:
  // shape: [B, ...] of the state. Allocates everything; later calls allocate nothing.
  SamplingLoop(int64_t depth, const std::vector<int64_t>& shape, pybind11::object state_dtype,
      pybind11::object network_dtype);

  // Copies x into the state and writes the first network input, c_in * x.
  // x: [B, ...]; c_in: [] or [B]; both in the state dtype.
  void start(pybind11::handle x, pybind11::handle c_in);
  // One row on the network's output. row: [R] or [B, R].
  void step(pybind11::handle f, pybind11::handle f_cond, pybind11::handle row);
  // start, then for every row n: f = network(n, network_input), step, callback(n, state). An m that
  // no later row weighs is not stored in the ring, and the last row writes no network input. rows:
  // [n, R] or [n, B, R], copied before the first call; with row_fn, rows is the number of rows and
  // row_fn(n) is called for row n after evaluation n. Values that a callback writes into the state
  // count from the next evaluation on. Everything Python may have changed is looked at again after
  // each call of it.
  void run(pybind11::handle x, pybind11::handle c_in, pybind11::handle rows,
      pybind11::handle network, pybind11::handle row_fn, pybind11::handle callback);

  const pybind11::object& state() { return state_.tensor(); }
  const pybind11::object& network_input() { return network_input_.tensor(); }
  HistoryRing& ring() { return *ring_; }

 private:
  class Busy;
  void begin(pybind11::handle x, pybind11::handle c_in);
  void evaluate(pybind11::handle network, int64_t n);
  void take_outputs();
  void take_output(pybind11::handle f, pybind11::handle f_cond);
  void take_row(pybind11::handle row);
  void check_row_shape(const TensorView& view, pybind11::handle object, int leading) const;
  // Copies the rows of a run, so that nothing Python does to `rows` meanwhile can reach it.
  void copy_table(pybind11::handle rows);
  const char* table_row(int64_t n) const { return table_.data() + n * row_bytes_; }
  // Whether a row after n weighs the m of row n.
  bool read_later(int64_t n) const;
  void run_row();
  void call_back(pybind11::handle callback, bool last);

  std::vector<int64_t> shape_;
  RowArgs args_;
  LiveTensor state_, network_input_;
  std::vector<char> table_; // rows known beforehand, [count_, R] or [count_, B, R]
  int64_t row_bytes_ = 0, count_ = 0;
  bool table_per_sample_ = false;
  std::vector<char> c_in_; // column c_in of the row at hand, [] or [B]
  pybind11::object index_;
  pybind11::object output_; // keeps the network's output alive while its row runs
  std::unique_ptr<HistoryRing> ring_;
  bool busy_ = false;
};

} // namespace dlms
