#include "graph_run.h"

#include <string>

namespace dlms::cuda {
namespace {

DevicePtr address(const void* pointer) {
  return static_cast<DevicePtr>(reinterpret_cast<uintptr_t>(pointer));
}

} // namespace

void OwnedGraph::reset() {
  if (graph_ != nullptr) driver_.graph_destroy(graph_);
  graph_ = nullptr;
}

Graph OwnedGraph::release() {
  const Graph graph = graph_;
  graph_ = nullptr;
  return graph;
}

GraphRun::GraphRun(
    Graph graph, std::vector<Span> inputs, Span output, int device, Ownership ownership)
    : driver_(driver()),
      device_(device),
      graph_(driver_, ownership == Ownership::kTake ? graph : nullptr),
      context_(driver_, device),
      inputs_(std::move(inputs)),
      output_(output) {
  try {
    check_spans();
    const ContextScope scope(driver_, context_.get());
    make(graph);
  } catch (...) {
    destroy();
    throw;
  }
}

void GraphRun::check_spans() const {
  for (const Span& span : inputs_)
    if (span.data == nullptr || span.bytes == 0)
      throw std::invalid_argument("an input of a captured run is empty");
  if (output_.data == nullptr || output_.bytes == 0)
    throw std::invalid_argument("the output of a captured run is empty");
}

// The instantiated graph is never changed: after a change the driver sends all of it to the device
// again with the next launch, which for a thousand nodes takes longer than every copy around it.
void GraphRun::make(Graph graph) {
  driver_.check(driver_.graph_nodes(graph, nullptr, &nodes_), "cuGraphGetNodes");
  if (nodes_ == 0)
    throw DriverError(
        "the capture recorded nothing: its work ran on another stream or device than the "
        "capture's");
  driver_.check(driver_.event_create(&done_, kEventDisableTiming), "cuEventCreate");
  driver_.check(
      driver_.instantiate(&exec_, graph, kAutoFreeOnLaunch), "cuGraphInstantiateWithFlags");
}

GraphRun::~GraphRun() {
  destroy();
}

// A run that is under way goes on: the driver keeps what it needs until it has ended.
void GraphRun::destroy() {
  if (exec_ != nullptr) driver_.exec_destroy(exec_);
  if (done_ != nullptr) driver_.event_destroy(done_);
  graph_.reset();
}

void GraphRun::launch(const std::vector<Span>& inputs, void* output, Stream stream) {
  if (inputs.size() != inputs_.size())
    throw std::invalid_argument("the run has " + std::to_string(inputs_.size()) + " inputs, not " +
                                std::to_string(inputs.size()));
  for (size_t i = 0; i < inputs.size(); ++i)
    if (inputs[i].bytes == 0 || inputs[i].bytes > inputs_[i].bytes)
      throw std::invalid_argument("input " + std::to_string(i) + " has " +
                                  std::to_string(inputs[i].bytes) + " bytes, the run takes 1 to " +
                                  std::to_string(inputs_[i].bytes));
  const ContextScope scope(driver_, context_.get());
  const std::lock_guard<std::mutex> lock(mutex_);
  // Also on the stream of the run before: its handle may be that of a new stream by now.
  driver_.check(driver_.stream_wait(stream, done_, 0), "cuStreamWaitEvent");
  try {
    enqueue(inputs, output, stream);
  } catch (...) {
    driver_.event_record(done_, stream); // the next run waits for what was enqueued
    throw;
  }
  driver_.check(driver_.event_record(done_, stream), "cuEventRecord");
  launches_.fetch_add(1, std::memory_order_relaxed);
}

// Every input is copied, also from the address of the run before: its values may be others.
void GraphRun::enqueue(const std::vector<Span>& inputs, void* output, Stream stream) {
  for (size_t i = 0; i < inputs.size(); ++i)
    driver_.check(driver_.copy_async(
                      address(inputs_[i].data), address(inputs[i].data), inputs[i].bytes, stream),
        "cuMemcpyDtoDAsync");
  driver_.check(driver_.launch(exec_, stream), "cuGraphLaunch");
  driver_.check(driver_.copy_async(address(output), address(output_.data), output_.bytes, stream),
      "cuMemcpyDtoDAsync");
}

void GraphRun::upload(Stream stream) {
  const ContextScope scope(driver_, context_.get());
  const std::lock_guard<std::mutex> lock(mutex_);
  driver_.check(driver_.upload(exec_, stream), "cuGraphUpload");
}

namespace {

// Fills `graph`, whose condition is `handle`: the counter's reset, `first`, and the loop.
void build_loop(const Driver& driver, Context context, Graph graph, Graph first, Graph body,
    Function advance, int* counter, const int* count) {
  MemsetNode zero;
  zero.dst = address(counter);
  GraphNode before = nullptr;
  driver.check(
      driver.add_memset(&before, graph, nullptr, 0, &zero, context), "cuGraphAddMemsetNode");
  if (first != nullptr) {
    GraphNode node = nullptr;
    driver.check(driver.add_child(&node, graph, &before, 1, first), "cuGraphAddChildGraphNode");
    before = node;
  }
  ConditionalNode loop;
  driver.check(driver.conditional_handle(&loop.handle, graph, context, 1, kConditionAssignDefault),
      "cuGraphConditionalHandleCreate");
  loop.context = context;
  GraphNode node = nullptr;
  driver.check(driver.add_node(&node, graph, &before, 1, &loop), "cuGraphAddNode");
  const Graph inside = loop.bodies[0];
  GraphNode once = nullptr, step = nullptr;
  driver.check(driver.add_child(&once, inside, nullptr, 0, body), "cuGraphAddChildGraphNode");
  void* arguments[] = {&loop.handle, &counter, &count};
  KernelNode kernel;
  kernel.function = advance;
  kernel.arguments = arguments;
  driver.check(driver.add_kernel(&step, inside, &once, 1, &kernel), "cuGraphAddKernelNode");
}

} // namespace

Graph loop_graph(
    Graph first, Graph body, Function advance, int* counter, const int* count, int device) {
  const Driver& driver = cuda::driver();
  if (driver.conditional_handle == nullptr || driver.add_node == nullptr)
    throw DriverError("the CUDA driver has no conditional nodes: it is older than CUDA 12.4");
  const PrimaryContext context(driver, device);
  const ContextScope scope(driver, context.get());
  Graph graph = nullptr;
  driver.check(driver.graph_create(&graph, 0), "cuGraphCreate");
  try {
    build_loop(driver, context.get(), graph, first, body, advance, counter, count);
  } catch (...) {
    driver.graph_destroy(graph);
    throw;
  }
  return graph;
}

uintptr_t loop_kernel(const std::string& library, int device) {
  const Driver& driver = cuda::driver();
  const PrimaryContext context(driver, device);
  const ContextScope scope(driver, context.get());
  using Find = int (*)(void**);
  const auto find = reinterpret_cast<Find>(library_symbol(library, "dlms_loop_advance"));
  void* function = nullptr;
  const int status = find(&function);
  if (status != 0 || function == nullptr)
    throw DriverError("dlms_loop_advance of " + library + ": CUDA error " + std::to_string(status));
  return reinterpret_cast<uintptr_t>(function);
}

} // namespace dlms::cuda
