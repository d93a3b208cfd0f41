// A stand-in of NVIDIA's driver library for tests: graphs are kept as lists of nodes and launching
// one runs it, on host memory, in the order that its edges demand. A kernel's function is a host
// function that takes the argument array. Build: c++ -shared -fPIC -std=c++17 standin.cpp -o
// libcuda_standin.so
#include <cstdint>
#include <cstring>
#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

struct Kernel {
  void (*function)(void**);
  unsigned grid[3], block[3], shared;
  void** arguments;
  void** extra;
  void* kernel;
  void* context;
};
struct Memset {
  unsigned long long dst;
  size_t pitch;
  unsigned value, element_size;
  size_t width, height;
};
struct Conditional {
  int type;
  int reserved0[3];
  unsigned long long handle;
  int condition;
  unsigned size;
  struct Graph** bodies;
  void* context;
};

struct Node {
  enum Kind { kKernel, kMemset, kChild, kWhile } kind;
  void (*function)(void**) = nullptr;
  std::vector<std::vector<char>> arguments; // values, copied when the node is added
  Memset memset{};
  struct Graph* child = nullptr;
  unsigned long long handle = 0;
  std::vector<Node*> after; // what runs before this node
  struct Graph* graph = nullptr;
};
struct Graph {
  std::vector<Node*> nodes;
  std::map<unsigned long long, unsigned> initial; // conditions' values at launch
  Graph* body_slot = nullptr;
};
struct Exec {
  Graph* graph; // a copy
};
// Work is done when it is enqueued, so waiting is only checked: an event has to have been recorded
// after the last work of a run, on whatever stream.
struct Event {
  long recorded = 0; // the number of the latest work when it was
};

std::mutex mutex;
std::map<std::string, int> calls, failures;
std::atomic<int> depth{0};
std::map<unsigned long long, unsigned> conditions;
unsigned long long next_handle = 1;
std::atomic<long> work{0};     // copies and launches so far
std::atomic<int> unordered{0}; // runs that did not wait for the one before
std::set<void*> alive;
constexpr size_t kArgument = 8; // every argument of the tests' kernels

int enter(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++calls[name];
  const auto failure = failures.find(name);
  return failure == failures.end() ? 0 : failure->second;
}
#define ENTER(name) \
  if (const int status = enter(name)) return status

Graph* copy_of(const Graph* from) {
  auto* to = new Graph(*from);
  std::map<Node*, Node*> made; // node of the original -> its copy
  for (Node*& node : to->nodes) {
    Node* copy = new Node(*node);
    copy->graph = to;
    made[node] = copy;
    if (copy->child != nullptr) copy->child = copy_of(copy->child);
    node = copy;
  }
  for (Node* node : to->nodes)
    for (Node*& before : node->after) before = made.at(before);
  const std::lock_guard<std::mutex> lock(mutex);
  alive.insert(to);
  return to;
}

void run(Graph* graph);

void run(Node* node) {
  switch (node->kind) {
    case Node::kKernel: {
      std::vector<void*> pointers;
      for (auto& value : node->arguments) pointers.push_back(value.data());
      return node->function(pointers.data());
    }
    case Node::kMemset:
      for (size_t i = 0; i < node->memset.width; ++i)
        reinterpret_cast<unsigned*>(node->memset.dst)[i] = node->memset.value;
      return;
    case Node::kChild: return run(node->child);
    case Node::kWhile:
      for (int n = 0; conditions[node->handle] != 0 && n < 1000; ++n) run(node->child);
      return;
  }
}

void run(Graph* graph) {
  for (const auto& [handle, value] : graph->initial) conditions[handle] = value;
  std::set<Node*> done;
  while (done.size() < graph->nodes.size()) {
    const size_t before = done.size();
    for (Node* node : graph->nodes) {
      bool ready = done.count(node) == 0;
      for (Node* other : node->after) ready = ready && done.count(other) != 0;
      if (!ready) continue;
      run(node);
      done.insert(node);
    }
    if (done.size() == before) return; // a cycle: a test's assertion on the result tells
  }
}

Node* add(Graph* graph, Node* const* after, size_t count, Node::Kind kind) {
  auto* node = new Node;
  node->kind = kind;
  node->graph = graph;
  node->after.assign(after, after + count);
  graph->nodes.push_back(node);
  return node;
}

} // namespace

extern "C" {

// -- for tests ------------------------------------------------------------------------------------

int standin_calls(const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  return calls[name];
}
void standin_fail(const char* name, int status) { // 0: works again
  const std::lock_guard<std::mutex> lock(mutex);
  if (status == 0) {
    failures.erase(name);
  } else {
    failures[name] = status;
  }
}
int standin_alive() { // graphs and instantiated graphs that were not destroyed
  const std::lock_guard<std::mutex> lock(mutex);
  return static_cast<int>(alive.size());
}
// The kernel of a WHILE node, (handle, counter, count), as kernels/cuda/graph_loop.cu has it.
void standin_advance(void** arguments) {
  const auto handle = *static_cast<unsigned long long*>(arguments[0]);
  int* counter = *static_cast<int**>(arguments[1]);
  const int* count = *static_cast<int**>(arguments[2]);
  *counter += 1;
  conditions[handle] = *counter < *count ? 1 : 0;
}

int dlms_loop_advance(void** function) {
  *function = reinterpret_cast<void*>(&standin_advance);
  return 0;
}

// -- the driver -----------------------------------------------------------------------------------

int cuInit(unsigned) {
  ENTER("cuInit");
  return 0;
}
int cuGetErrorString(int status, const char** text) {
  *text = status == 1 ? "invalid argument" : status == 2 ? "out of memory" : "unknown error";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  ENTER("cuDeviceGet");
  *device = ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER("cuDevicePrimaryCtxRetain");
  *context = reinterpret_cast<void*>(static_cast<uintptr_t>(device) + 1);
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) {
  ENTER("cuDevicePrimaryCtxRelease_v2");
  return 0;
}
int cuCtxPushCurrent_v2(void*) {
  ENTER("cuCtxPushCurrent_v2");
  ++depth;
  return 0;
}
int cuCtxPopCurrent_v2(void**) {
  ENTER("cuCtxPopCurrent_v2");
  --depth;
  return 0;
}
int standin_depth() {
  return depth;
}
int cuStreamCreate(void** stream, unsigned) {
  ENTER("cuStreamCreate");
  *stream = new int;
  return 0;
}
int cuStreamSynchronize(void*) {
  ENTER("cuStreamSynchronize");
  return 0;
}
int cuStreamDestroy_v2(void* stream) {
  ENTER("cuStreamDestroy_v2");
  delete static_cast<int*>(stream);
  return 0;
}
int cuEventCreate(Event** event, unsigned) {
  ENTER("cuEventCreate");
  *event = new Event;
  const std::lock_guard<std::mutex> lock(mutex);
  alive.insert(*event);
  return 0;
}
int cuEventRecord(Event* event, void*) {
  ENTER("cuEventRecord");
  event->recorded = work;
  return 0;
}
int cuStreamWaitEvent(void*, Event* event, unsigned) {
  ENTER("cuStreamWaitEvent");
  if (event->recorded != work) ++unordered;
  return 0;
}
int standin_unordered() { // with one run and one thread at a time
  return unordered;
}
int cuEventDestroy_v2(Event* event) {
  ENTER("cuEventDestroy_v2");
  const std::lock_guard<std::mutex> lock(mutex);
  return alive.erase(event) == 1 ? 0 : 1;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void*) {
  ENTER("cuMemcpyDtoDAsync_v2");
  ++work;
  std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
  return 0;
}
int cuMemAlloc_v2(unsigned long long* memory, size_t bytes) {
  ENTER("cuMemAlloc_v2");
  *memory = reinterpret_cast<unsigned long long>(new char[bytes]);
  return 0;
}
int cuMemFree_v2(unsigned long long memory) {
  ENTER("cuMemFree_v2");
  delete[] reinterpret_cast<char*>(memory);
  return 0;
}
int cuGraphCreate(Graph** graph, unsigned) {
  ENTER("cuGraphCreate");
  *graph = new Graph;
  const std::lock_guard<std::mutex> lock(mutex);
  alive.insert(*graph);
  return 0;
}
int cuGraphDestroy(Graph* graph) {
  ENTER("cuGraphDestroy");
  const std::lock_guard<std::mutex> lock(mutex);
  return alive.erase(graph) == 1 ? 0 : 1;
}
int cuGraphGetNodes(Graph* graph, Node** nodes, size_t* count) {
  ENTER("cuGraphGetNodes");
  if (nodes != nullptr) std::memcpy(nodes, graph->nodes.data(), *count * sizeof(Node*));
  *count = graph->nodes.size();
  return 0;
}
int cuGraphAddMemsetNode(
    Node** node, Graph* graph, Node* const* after, size_t count, const Memset* memset, void*) {
  ENTER("cuGraphAddMemsetNode");
  *node = add(graph, after, count, Node::kMemset);
  (*node)->memset = *memset;
  return 0;
}
int cuGraphAddKernelNode_v2(
    Node** node, Graph* graph, Node* const* after, size_t count, const Kernel* kernel) {
  ENTER("cuGraphAddKernelNode_v2");
  *node = add(graph, after, count, Node::kKernel);
  (*node)->function = kernel->function;
  // As the driver does, the values are taken now. The tests' kernels have three arguments.
  for (int i = 0; kernel->arguments != nullptr && i < 3; ++i) {
    const char* from = static_cast<const char*>(kernel->arguments[i]);
    (*node)->arguments.emplace_back(from, from + kArgument);
  }
  return 0;
}
int cuGraphAddChildGraphNode(
    Node** node, Graph* graph, Node* const* after, size_t count, Graph* child) {
  ENTER("cuGraphAddChildGraphNode");
  *node = add(graph, after, count, Node::kChild);
  (*node)->child = copy_of(child);
  return 0;
}
int cuGraphConditionalHandleCreate(
    unsigned long long* handle, Graph* graph, void*, unsigned initial, unsigned flags) {
  ENTER("cuGraphConditionalHandleCreate");
  if (flags != 1) return 1;
  *handle = next_handle++;
  graph->initial[*handle] = initial;
  return 0;
}
int cuGraphAddNode(
    Node** node, Graph* graph, Node* const* after, size_t count, Conditional* parameters) {
  ENTER("cuGraphAddNode");
  if (parameters->type != 13 || parameters->condition != 1 || parameters->size != 1) return 1;
  *node = add(graph, after, count, Node::kWhile);
  (*node)->handle = parameters->handle;
  (*node)->child = new Graph;
  parameters->bodies = &(*node)->child;
  return 0;
}
int cuGraphInstantiateWithFlags(Exec** exec, Graph* graph, unsigned long long) {
  ENTER("cuGraphInstantiateWithFlags");
  *exec = new Exec;
  (*exec)->graph = copy_of(graph);
  return 0;
}
int cuGraphUpload(Exec*, void*) {
  ENTER("cuGraphUpload");
  return 0;
}
int cuGraphLaunch(Exec* exec, void*) {
  ENTER("cuGraphLaunch");
  ++work;
  run(exec->graph);
  return 0;
}
int cuGraphExecDestroy(Exec* exec) {
  ENTER("cuGraphExecDestroy");
  const std::lock_guard<std::mutex> lock(mutex);
  return alive.erase(exec->graph) == 1 ? 0 : 1;
}

} // extern "C"
