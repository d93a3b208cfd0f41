// A captured run: one instantiated CUDA graph that copies its inputs in, runs and copies its result
// out, started by one call of the driver.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "driver.h"

namespace dlms::cuda {

// Device memory that the captured work reads (an input) or has written (the output).
struct Span {
  void* data = nullptr;
  size_t bytes = 0;
};

class GraphRun {
 public:
  // graph: what a stream capture recorded, or a loop_graph. It is copied, or taken over (a graph
  // with a loop cannot be copied; it is destroyed with this object, and if this throws). The memory
  // that it refers to must outlive this object. Its first nodes may read `inputs`, its last have
  // written `output`. DriverError: the graph is empty (work of another device or stream is not
  // recorded), or the driver refuses it.
  enum class Ownership { kCopy, kTake };
  GraphRun(Graph graph, std::vector<Span> inputs, Span output, int device,
      Ownership ownership = Ownership::kCopy);
  ~GraphRun();
  GraphRun(const GraphRun&) = delete;
  GraphRun& operator=(const GraphRun&) = delete;

  // Enqueues one run on `stream`, and does not wait for it: inputs[i].bytes are copied from
  // inputs[i].data, the result to `output`. The memory may be used again by work enqueued on
  // `stream` afterwards. Any thread, any stream of the device: CUDA orders the runs of one
  // instantiated graph, also across streams.
  // std::invalid_argument: another number of inputs, or more bytes than an input holds.
  void launch(const std::vector<Span>& inputs, void* output, Stream stream);

  // Sends the graph to the device ahead of the first run.
  void upload(Stream stream);

  int device() const { return device_; }
  const std::vector<Span>& inputs() const { return inputs_; }
  Span output() const { return output_; }
  size_t nodes() const { return nodes_; } // copies included
  uint64_t launches() const { return launches_.load(std::memory_order_relaxed); }

 private:
  void check_spans() const;
  void add_copies();
  void bind(GraphNode node, Span& bound, const void* from, void* to, size_t bytes);

  const Driver& driver_;
  int device_;
  PrimaryContext context_;
  std::vector<Span> inputs_;
  Span output_;
  std::mutex mutex_; // re-binding and launching belong together
  Graph graph_ = nullptr;
  GraphExec exec_ = nullptr;
  std::vector<GraphNode> copies_;
  GraphNode result_ = nullptr;
  std::vector<Span> bound_; // what the copies read now
  Span bound_output_;       // and where the result goes
  size_t nodes_ = 0;
  std::atomic<uint64_t> launches_{0};
};

// `*count` runs of `body` as one graph, by a WHILE node: one capture for any number of evaluations.
// Before each launch `*counter` is set to 0; `advance` is a kernel (handle, counter, count) that
// adds 1 to it and sets the condition to counter < count. The body reads its row at `*counter`.
// counter, count: int32 in device memory, count >= 1. `first` runs once, before the loop; it may be
// null. Both are copied. The result is the caller's to destroy, or to hand to a GraphRun.
// DriverError: the driver has no conditional nodes (before CUDA 12.4).
Graph loop_graph(
    Graph first, Graph body, Function advance, int* counter, const int* count, int device);

// `advance` of loop_graph on a device, from the library of the CUDA operators (_ops_cuda), by its
// path. DriverError: the library has none.
uintptr_t loop_kernel(const std::string& library, int device);

} // namespace dlms::cuda
