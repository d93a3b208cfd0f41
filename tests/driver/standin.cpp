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

struct Copy { // CUDA_MEMCPY3D_v2, the fields of a plain copy
  size_t before_src[4];
  int src_type;
  const void* src_host;
  unsigned long long src;
  void* src_array;
  void* reserved0;
  size_t src_pitch, src_height;
  size_t before_dst[4];
  int dst_type;
  void* dst_host;
  unsigned long long dst;
  void* dst_array;
  void* reserved1;
  size_t dst_pitch, dst_height;
  size_t width, height, depth;
};
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
  enum Kind { kCopy, kKernel, kMemset, kChild, kWhile } kind;
  Copy copy{};
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
  Graph* graph;                 // a copy
  std::map<Node*, Node*> nodes; // of the graph it was made from -> of the copy
};

std::mutex mutex;
std::map<std::string, int> calls, failures;
std::atomic<int> depth{0};
std::map<unsigned long long, unsigned> conditions;
unsigned long long next_handle = 1;
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

Graph* copy_of(const Graph* from, std::map<Node*, Node*>* map) {
  auto* to = new Graph(*from);
  std::map<Node*, Node*> local;
  if (map == nullptr) map = &local;
  for (Node*& node : to->nodes) {
    Node* made = new Node(*node);
    made->graph = to;
    (*map)[node] = made;
    if (made->child != nullptr) made->child = copy_of(made->child, map);
    node = made;
  }
  for (Node* node : to->nodes)
    for (Node*& before : node->after) before = map->at(before);
  const std::lock_guard<std::mutex> lock(mutex);
  alive.insert(to);
  return to;
}

void run(Graph* graph);

void run(Node* node) {
  switch (node->kind) {
    case Node::kCopy:
      std::memmove(reinterpret_cast<void*>(node->copy.dst),
          reinterpret_cast<const void*>(node->copy.src), node->copy.width);
      return;
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
int cuGraphClone(Graph** clone, Graph* graph) {
  ENTER("cuGraphClone");
  *clone = copy_of(graph, nullptr);
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
int cuGraphGetRootNodes(Graph* graph, Node** nodes, size_t* count) {
  ENTER("cuGraphGetRootNodes");
  size_t n = 0;
  for (Node* node : graph->nodes) {
    if (!node->after.empty()) continue;
    if (nodes != nullptr) nodes[n] = node;
    ++n;
  }
  *count = n;
  return 0;
}
int cuGraphNodeGetDependentNodes(Node* node, Node**, size_t* count) {
  ENTER("cuGraphNodeGetDependentNodes");
  *count = 0;
  for (Node* other : node->graph->nodes)
    for (Node* before : other->after) *count += before == node ? 1 : 0;
  return 0;
}
int cuGraphAddDependencies(Graph*, Node* const* from, Node* const* to, size_t count) {
  ENTER("cuGraphAddDependencies");
  for (size_t i = 0; i < count; ++i) to[i]->after.push_back(from[i]);
  return 0;
}
int cuGraphAddMemcpyNode(
    Node** node, Graph* graph, Node* const* after, size_t count, const Copy* copy, void*) {
  ENTER("cuGraphAddMemcpyNode");
  if (copy->height != 1 || copy->depth != 1 || copy->width == 0) return 1;
  *node = add(graph, after, count, Node::kCopy);
  (*node)->copy = *copy;
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
  (*node)->child = copy_of(child, nullptr);
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
  (*exec)->graph = copy_of(graph, &(*exec)->nodes);
  return 0;
}
int cuGraphExecMemcpyNodeSetParams(Exec* exec, Node* node, const Copy* copy, void*) {
  ENTER("cuGraphExecMemcpyNodeSetParams");
  if (exec->nodes.count(node) == 0) return 1;
  exec->nodes.at(node)->copy = *copy;
  return 0;
}
int cuGraphUpload(Exec*, void*) {
  ENTER("cuGraphUpload");
  return 0;
}
int cuGraphLaunch(Exec* exec, void*) {
  ENTER("cuGraphLaunch");
  run(exec->graph);
  return 0;
}
int cuGraphExecDestroy(Exec* exec) {
  ENTER("cuGraphExecDestroy");
  const std::lock_guard<std::mutex> lock(mutex);
  return alive.erase(exec->graph) == 1 ? 0 : 1;
}

} // extern "C"
