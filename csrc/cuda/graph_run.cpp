#include "graph_run.h"

#include <string>

namespace dlms::cuda {
namespace {

DevicePtr address(const void* pointer) {
  return static_cast<DevicePtr>(reinterpret_cast<uintptr_t>(pointer));
}

Copy copy_of(const void* from, void* to, size_t bytes) {
  Copy copy;
  copy.src = address(from);
  copy.dst = address(to);
  copy.src_pitch = copy.dst_pitch = copy.width = bytes;
  copy.src_height = copy.dst_height = 1;
  return copy;
}

std::vector<GraphNode> nodes_of(
    const Driver& driver, Graph graph, int (*query)(Graph, GraphNode*, size_t*)) {
  size_t count = 0;
  driver.check(query(graph, nullptr, &count), "cuGraphGetNodes");
  std::vector<GraphNode> nodes(count);
  if (count != 0) driver.check(query(graph, nodes.data(), &count), "cuGraphGetNodes");
  return nodes;
}

std::vector<GraphNode> leaves_of(const Driver& driver, const std::vector<GraphNode>& nodes) {
  std::vector<GraphNode> leaves;
  for (const GraphNode node : nodes) {
    size_t dependents = 0;
    driver.check(
        driver.node_dependents(node, nullptr, &dependents), "cuGraphNodeGetDependentNodes");
    if (dependents == 0) leaves.push_back(node);
  }
  return leaves;
}

} // namespace

GraphRun::GraphRun(
    Graph graph, std::vector<Span> inputs, Span output, int device, Ownership ownership)
    : driver_(driver()),
      device_(device),
      context_(driver_, device),
      inputs_(std::move(inputs)),
      output_(output),
      graph_(ownership == Ownership::kTake ? graph : nullptr) {
  try {
    check_spans();
    const ContextScope scope(driver_, context_.get());
    if (graph_ == nullptr) driver_.check(driver_.graph_clone(&graph_, graph), "cuGraphClone");
    add_copies();
    driver_.check(
        driver_.instantiate(&exec_, graph_, kAutoFreeOnLaunch), "cuGraphInstantiateWithFlags");
  } catch (...) {
    if (graph_ != nullptr) driver_.graph_destroy(graph_);
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

// The copies start out bound to their own buffers and are bound anew by the first launch.
void GraphRun::add_copies() {
  const std::vector<GraphNode> all = nodes_of(driver_, graph_, driver_.graph_nodes);
  if (all.empty())
    throw DriverError(
        "the capture recorded nothing: its work ran on another stream or device than the "
        "capture's");
  const std::vector<GraphNode> roots = nodes_of(driver_, graph_, driver_.graph_roots);
  const std::vector<GraphNode> leaves = leaves_of(driver_, all);
  for (const Span& span : inputs_) {
    const Copy copy = copy_of(span.data, span.data, span.bytes);
    GraphNode node = nullptr;
    driver_.check(
        driver_.add_copy(&node, graph_, nullptr, 0, &copy, context_.get()), "cuGraphAddMemcpyNode");
    for (const GraphNode root : roots)
      driver_.check(driver_.add_dependencies(graph_, &node, &root, 1), "cuGraphAddDependencies");
    copies_.push_back(node);
  }
  const Copy copy = copy_of(output_.data, output_.data, output_.bytes);
  driver_.check(
      driver_.add_copy(&result_, graph_, leaves.data(), leaves.size(), &copy, context_.get()),
      "cuGraphAddMemcpyNode");
  bound_ = inputs_;
  bound_output_ = output_;
  nodes_ = all.size() + inputs_.size() + 1;
}

GraphRun::~GraphRun() {
  // A run that is under way goes on: the driver keeps what it needs until it has ended.
  if (exec_ != nullptr) driver_.exec_destroy(exec_);
  if (graph_ != nullptr) driver_.graph_destroy(graph_);
}

void GraphRun::bind(GraphNode node, Span& bound, const void* from, void* to, size_t bytes) {
  const Copy copy = copy_of(from, to, bytes);
  // Runs that are already enqueued keep the addresses that they were enqueued with.
  driver_.check(
      driver_.set_copy(exec_, node, &copy, context_.get()), "cuGraphExecMemcpyNodeSetParams");
  bound.bytes = bytes;
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
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (bound_[i].data == inputs[i].data && bound_[i].bytes == inputs[i].bytes) continue;
    bind(copies_[i], bound_[i], inputs[i].data, inputs_[i].data, inputs[i].bytes);
    bound_[i].data = inputs[i].data;
  }
  if (bound_output_.data != output) {
    bind(result_, bound_output_, output_.data, output, output_.bytes);
    bound_output_.data = output;
  }
  driver_.check(driver_.launch(exec_, stream), "cuGraphLaunch");
  launches_.fetch_add(1, std::memory_order_relaxed);
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
