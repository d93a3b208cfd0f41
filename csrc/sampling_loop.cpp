#include "sampling_loop.h"

#include <pybind11/stl.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <stdexcept>

namespace py = pybind11;

namespace dlms {
namespace {

// Rows of fewer elements finish in a few microseconds: handing the interpreter to another thread
// for that long can cost this one the 5 ms that Python then lets it run.
constexpr int64_t kReleaseGil = 65536;

void run_blocks(const RowArgs& args, int64_t total) {
  struct Context {
    const RowArgs* args;
    int64_t total;
  } context = {&args, total};
  const auto body = [](int64_t begin, int64_t end, void* raw) {
    const auto& c = *static_cast<const Context*>(raw);
    const int64_t stop = end * kBlock;
    kernels().forward(*c.args, begin * kBlock, stop < c.total ? stop : c.total);
  };
  const int64_t blocks = (total + kBlock - 1) / kBlock;
  // torch's own thread pool, through its stable C interface.
  if (torch_parallel_for(0, blocks, kGrain / kBlock, body, &context) != 0)
    throw std::runtime_error("torch_parallel_for failed in SamplingLoop");
}

} // namespace

// Marks the loop as running, and as free again however the scope is left.
class SamplingLoop::Busy {
 public:
  explicit Busy(SamplingLoop& loop) : loop_(loop) {
    if (loop.busy_)
      throw std::runtime_error(
          "SamplingLoop is running already: use one loop per thread, and do not call it from its "
          "own network or callback");
    loop.busy_ = true;
  }
  ~Busy() {
    loop_.busy_ = false;
    loop_.output_ = py::object();
  }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  SamplingLoop& loop_;
};

SamplingLoop::SamplingLoop(int64_t depth, const std::vector<int64_t>& shape, py::object state_dtype,
    py::object network_dtype)
    : shape_(shape) {
  if (shape.empty()) throw py::value_error("shape is [], expected [B, ...]");
  if (depth < 1 || depth > kMaxDepth)
    throw py::value_error(
        "depth is " + std::to_string(depth) + ", expected 1 to " + std::to_string(kMaxDepth));
  args_.state = dtype_from_python(state_dtype, "state_dtype");
  args_.network = dtype_from_python(network_dtype, "network_dtype");
  const bool wide = args_.state == Dtype::kFloat64;
  if ((!wide && args_.state != Dtype::kFloat32) || wide != (args_.network == Dtype::kFloat64))
    throw py::value_error(
        std::string("state ") + dtype_name(args_.state) + " with network " +
        dtype_name(args_.network) +
        ": expected a float32 state with a float32, bfloat16 or float16 network, or float64 both");
  const int64_t state_bytes = page_up(checked_bytes(shape, args_.state));
  const int64_t input_bytes = page_up(checked_bytes(shape, args_.network));
  args_.batch = shape[0];
  args_.depth = depth;
  args_.inner = shape[0] == 0 ? 0 : product(shape) / shape[0];

  // One allocation, every part on a page of its own: parts that start at the same place within a
  // page never wait for each other's stores (measured: up to 1.4 times faster than 64 bytes apart).
  std::vector<int64_t> ring_shape = {depth};
  ring_shape.insert(ring_shape.end(), shape.begin(), shape.end());
  const int64_t ring_bytes = checked_bytes(ring_shape, args_.state);
  const auto memory = allocate_pages(state_bytes + input_bytes + ring_bytes);
  state_ = LiveTensor(memory, 0, shape, args_.state);
  network_input_ = LiveTensor(memory, state_bytes, shape, args_.network);
  ring_ = std::make_unique<HistoryRing>(
      LiveTensor(memory, state_bytes + input_bytes, std::move(ring_shape), args_.state));

  args_.x = args_.x_next = state_.data();
  args_.network_input = network_input_.data();
  args_.ring = ring_->data();
}

void SamplingLoop::start(py::handle x, py::handle c_in) {
  const Busy busy(*this);
  begin(x, c_in);
}

void SamplingLoop::begin(py::handle x, py::handle c_in) {
  const int ndim = static_cast<int>(shape_.size());
  const TensorView from = view_of(x, "x");
  require(from, x, "x", shape_.data(), ndim, args_.state);
  const TensorView factor = view_of(c_in, "c_in");
  require(factor, c_in, "c_in", shape_.data(), factor.ndim == 0 ? 0 : 1, args_.state);
  const int64_t total = args_.batch * args_.inner;
  if (total == 0) return;
  RowArgs first = args_;
  first.x = from.data;
  first.per_sample = factor.ndim != 0;
  kernels().scale(first, factor.data, 0, total);
  ring_->reset();
}

void SamplingLoop::check_row_shape(const TensorView& view, py::handle object, int leading) const {
  const int64_t width = kB + args_.depth;
  const int64_t* shape = view.shape + leading;
  const bool one = view.ndim == leading + 1 && shape[0] == width;
  const bool each = view.ndim == leading + 2 && shape[0] == args_.batch && shape[1] == width;
  const bool memory = view.known_dtype && view.dtype == args_.state && view.on_cpu;
  if ((one || each) && memory && view.contiguous)
    return require_storage(view, object, leading != 0 ? "rows" : "row");
  const std::string rows = leading != 0 ? "rows, " : "";
  throw py::value_error((leading != 0 ? "rows is " : "row is ") + describe(object) +
                        (view.contiguous ? "" : " and not contiguous") +
                        ", expected contiguous torch." + dtype_name(args_.state) + " [" + rows +
                        std::to_string(width) + "] or [" + rows + std::to_string(args_.batch) +
                        ", " + std::to_string(width) + "] on cpu");
}

void SamplingLoop::copy_table(py::handle rows) {
  const TensorView view = view_of(rows, "rows");
  check_row_shape(view, rows, 1);
  table_per_sample_ = view.ndim == 3;
  count_ = view.shape[0];
  row_bytes_ =
      (kB + args_.depth) * element_size(args_.state) * (table_per_sample_ ? args_.batch : 1);
  const char* data = static_cast<const char*>(view.data);
  table_.assign(data, data + count_ * row_bytes_); // keeps its capacity from run to run
}

bool SamplingLoop::read_later(int64_t n) const {
  const int64_t width = kB + args_.depth, copies = table_per_sample_ ? args_.batch : 1;
  for (int64_t k = 1; k < args_.depth && n + k < count_; ++k) {
    const char* row = table_row(n + k);
    for (int64_t index = 0; index < copies; ++index) {
      const int64_t at = index * width + kB + k;
      const double weight = args_.state == Dtype::kFloat64
                                ? reinterpret_cast<const double*>(row)[at]
                                : static_cast<double>(reinterpret_cast<const float*>(row)[at]);
      if (weight != 0) return true; // NaN too
    }
  }
  return false;
}

void SamplingLoop::take_row(py::handle row) {
  const TensorView view = view_of(row, "row");
  check_row_shape(view, row, 0);
  args_.row = view.data;
  args_.per_sample = view.ndim == 2;
}

void SamplingLoop::take_output(py::handle f, py::handle f_cond) {
  const int ndim = static_cast<int>(shape_.size());
  const TensorView view = view_of(f, "the network's output");
  require(view, f, "the network's output", shape_.data(), ndim, args_.network);
  args_.f = view.data;
  args_.f_cond = nullptr;
  if (f_cond.is_none()) return;
  const TensorView second = view_of(f_cond, "the network's conditional output");
  require(second, f_cond, "the network's conditional output", shape_.data(), ndim, args_.network);
  args_.f_cond = second.data;
}

void SamplingLoop::evaluate(py::handle network, int64_t n) {
  index_ = py::int_(n);
  PyObject* arguments[] = {nullptr, index_.ptr(), network_input_.tensor().ptr()};
  output_ = py::reinterpret_steal<py::object>(PyObject_Vectorcall(
      network.ptr(), arguments + 1, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
  if (!output_) throw py::error_already_set();
  network_input_.require_unchanged("the network", "its input");
  if (PyTuple_Check(output_.ptr()) && PyTuple_GET_SIZE(output_.ptr()) != 2)
    throw py::value_error("the network returned a tuple of " +
                          std::to_string(PyTuple_GET_SIZE(output_.ptr())) +
                          ", expected F or (F_unconditional, F_conditional)");
}

// Right before the row runs: a row function may have resized or moved what the network returned.
void SamplingLoop::take_outputs() {
  if (!PyTuple_Check(output_.ptr())) return take_output(output_, py::none());
  take_output(PyTuple_GET_ITEM(output_.ptr(), 0), PyTuple_GET_ITEM(output_.ptr(), 1));
}

void SamplingLoop::run_row() {
  const int64_t total = args_.batch * args_.inner;
  if (total == 0) return;
  const int64_t bad = first_bad_slot(args_);
  if (bad >= 0)
    throw py::value_error("the slot column of row " + std::to_string(bad) + " is not one of 0 .. " +
                          std::to_string(args_.depth - 1));
  if (total < kReleaseGil) {
    kernels().forward(args_, 0, total);
  } else {
    const py::gil_scoped_release release;
    run_blocks(args_, total);
  }
  const auto slot = args_.state == Dtype::kFloat64
                        ? static_cast<const double*>(args_.row)[kSlot]
                        : static_cast<double>(static_cast<const float*>(args_.row)[kSlot]);
  if (args_.store_m) ring_->wrote(static_cast<int64_t>(slot));
}

void SamplingLoop::step(py::handle f, py::handle f_cond, py::handle row) {
  const Busy busy(*this);
  take_output(f, f_cond);
  take_row(row);
  args_.store_m = args_.store_input = true;
  run_row();
}

void SamplingLoop::run(py::handle x, py::handle c_in, py::handle rows, py::handle network,
    py::handle row_fn, py::handle callback) {
  const Busy busy(*this);
  const bool known = row_fn.is_none(); // all rows, beforehand
  if (known) {
    copy_table(rows);
  } else if (!py::isinstance<py::int_>(rows)) {
    throw py::type_error("with row_fn, rows is the number of rows, an int");
  } else {
    count_ = py::cast<int64_t>(rows);
  }
  begin(x, c_in);
  py::object row; // keeps a per-step row alive while it is read
  for (int64_t n = 0; n < count_; ++n) {
    const bool last = n + 1 == count_;
    evaluate(network, n);
    if (!known) row = row_fn(index_);
    take_outputs();
    if (known) {
      args_.row = table_row(n);
      args_.per_sample = table_per_sample_;
    } else {
      take_row(row);
    }
    args_.store_input = !last;
    // Rows that are not known yet may weigh anything.
    args_.store_m = known ? read_later(n) : !last;
    run_row();
    if (!callback.is_none()) call_back(callback, last);
  }
}

// The next input is formed again after the callback, from what the callback left in the state: a
// write through any alias of the memory (a view, NumPy) counts, whether torch saw it or not.
void SamplingLoop::call_back(py::handle callback, bool last) {
  const int64_t size = element_size(args_.state), width = (kB + args_.depth) * size;
  const int64_t total = args_.batch * args_.inner, copies = args_.per_sample ? args_.batch : 1;
  if (!last && total != 0) { // before the call: the row is Python's and may change in it
    c_in_.resize(static_cast<size_t>(copies * size));
    for (int64_t index = 0; index < copies; ++index)
      std::memcpy(c_in_.data() + index * size,
          static_cast<const char*>(args_.row) + index * width + kCIn * size,
          static_cast<size_t>(size));
  }
  const bool per_sample = args_.per_sample;
  callback(index_, state_.tensor());
  state_.require_unchanged("the callback", "the state");
  if (last || total == 0) return;
  RowArgs again = args_;
  again.per_sample = per_sample;
  kernels().scale(again, c_in_.data(), 0, total);
}

} // namespace dlms
