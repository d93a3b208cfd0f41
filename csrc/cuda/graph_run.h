// A captured run: an instantiated CUDA graph on buffers of its own, with copies before and after
// it.
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

// A graph of its own, or null.
class OwnedGraph {
 public:
  OwnedGraph(const Driver& driver, Graph graph) : driver_(driver), graph_(graph) {}
  ~OwnedGraph() { reset(); }
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;
  void reset();
  Graph release(); // the caller's from now on

 private:
  const Driver& driver_;
  Graph graph_;
};

class GraphRun {
 public:
  // graph: what a stream capture recorded, or a loop_graph. It is only read, and stays the caller's
  // (kBorrow), or is destroyed with this object, and if this throws (kTake). The memory that it
  // refers to must outlive this object. Its nodes may read `inputs` and have written `output`.
  // DriverError: the graph is empty (work of another device or stream is not recorded), or the
  // driver refuses it.
  enum class Ownership { kBorrow, kTake };
  GraphRun(Graph graph, std::vector<Span> inputs, Span output, int device,
      Ownership ownership = Ownership::kBorrow);
  ~GraphRun();
  GraphRun(const GraphRun&) = delete;
  GraphRun& operator=(const GraphRun&) = delete;

  // Enqueues one run on `stream`, and does not wait for it: inputs[i].bytes are copied from
  // inputs[i].data, the graph runs, the result is copied to `output`. The memory may be used again
  // by work enqueued on `stream` afterwards. Any thread, any stream of the device: a run waits, on
  // the device, for the one before it, since they share the buffers. std::invalid_argument: another
  // number of inputs, or more bytes than an input holds.
  void launch(const std::vector<Span>& inputs, void* output, Stream stream);

  // Sends the graph to the device ahead of the first run.
  void upload(Stream stream);

  int device() const { return device_; }
  const std::vector<Span>& inputs() const { return inputs_; }
  Span output() const { return output_; }
  size_t nodes() const { return nodes_; } // without the copies around it
  uint64_t launches() const { return launches_.load(std::memory_order_relaxed); }

 private:
  void check_spans() const;
  void make(Graph graph);
  void destroy();
  void enqueue(const std::vector<Span>& inputs, void* output, Stream stream);

  const Driver& driver_;
  int device_;
  OwnedGraph graph_; // ahead of the context, which may not be had
  PrimaryContext context_;
  std::vector<Span> inputs_;
  Span output_;
  std::mutex mutex_; // a run's copies and its launch belong together
  GraphExec exec_ = nullptr;
  Event done_ = nullptr; // of the latest run
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
