// The few functions of NVIDIA's driver library that captured runs need, found when first used: a
// module that includes this imports, and links, on machines without a GPU, a driver or a toolkit.
// Types and layouts are those of cuda.h, whose binary interface is fixed for a symbol's life;
// tests/kernels/test_cuda_driver.py compiles the two against each other.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

struct CUctx_st;
struct CUevent_st;
struct CUfunc_st;
struct CUgraph_st;
struct CUgraphExec_st;
struct CUgraphNode_st;
struct CUstream_st;

namespace dlms::cuda {

using Context = CUctx_st*;
using Event = CUevent_st*;
using Function = CUfunc_st*;
using Graph = CUgraph_st*;
using GraphExec = CUgraphExec_st*;
using GraphNode = CUgraphNode_st*;
using Stream = CUstream_st*;
using DevicePtr = unsigned long long;

constexpr unsigned long long kAutoFreeOnLaunch = 1; // as torch instantiates its own graphs
constexpr int kNodeConditional = 13;                // CU_GRAPH_NODE_TYPE_CONDITIONAL
constexpr int kConditionWhile = 1;                  // CU_GRAPH_COND_TYPE_WHILE
constexpr unsigned kConditionAssignDefault = 1;     // CU_GRAPH_COND_ASSIGN_DEFAULT
constexpr unsigned kStreamNonBlocking = 1;          // CU_STREAM_NON_BLOCKING
constexpr unsigned kEventDisableTiming = 2;         // CU_EVENT_DISABLE_TIMING

// CUDA_KERNEL_NODE_PARAMS_v2
struct KernelNode {
  Function function = nullptr;
  unsigned grid[3] = {1, 1, 1};
  unsigned block[3] = {1, 1, 1};
  unsigned shared_bytes = 0;
  void** arguments = nullptr;
  void** extra = nullptr;
  void* kernel = nullptr;
  Context context = nullptr;
};

// CUDA_MEMSET_NODE_PARAMS
struct MemsetNode {
  DevicePtr dst = 0;
  size_t pitch = 0;
  unsigned value = 0;
  unsigned element_size = 4;
  size_t width = 1, height = 1;
};

// CUgraphNodeParams holding a CUDA_CONDITIONAL_NODE_PARAMS
struct ConditionalNode {
  int type = kNodeConditional;
  int reserved0[3] = {0, 0, 0};
  unsigned long long handle = 0;
  int condition = kConditionWhile;
  unsigned size = 1;
  Graph* bodies = nullptr; // filled in: the graphs to build into
  Context context = nullptr;
  long long reserved1[29 - 4] = {};
  long long reserved2 = 0;
};

class DriverError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// (member, symbol in the library, parameters). The suffixes are part of the interface.
// clang-format off
#define DLMS_DRIVER_REQUIRED(entry) \
  entry(init, "cuInit", (unsigned flags)) \
  entry(error_string, "cuGetErrorString", (int status, const char** text)) \
  entry(device_get, "cuDeviceGet", (int* device, int ordinal)) \
  entry(primary_retain, "cuDevicePrimaryCtxRetain", (Context* context, int device)) \
  entry(primary_release, "cuDevicePrimaryCtxRelease_v2", (int device)) \
  entry(context_push, "cuCtxPushCurrent_v2", (Context context)) \
  entry(context_pop, "cuCtxPopCurrent_v2", (Context* context)) \
  entry(stream_create, "cuStreamCreate", (Stream* stream, unsigned flags)) \
  entry(stream_synchronize, "cuStreamSynchronize", (Stream stream)) \
  entry(stream_destroy, "cuStreamDestroy_v2", (Stream stream)) \
  entry(stream_wait, "cuStreamWaitEvent", (Stream stream, Event event, unsigned flags)) \
  entry(event_create, "cuEventCreate", (Event* event, unsigned flags)) \
  entry(event_record, "cuEventRecord", (Event event, Stream stream)) \
  entry(event_destroy, "cuEventDestroy_v2", (Event event)) \
  entry(memory_allocate, "cuMemAlloc_v2", (DevicePtr* memory, size_t bytes)) \
  entry(memory_free, "cuMemFree_v2", (DevicePtr memory)) \
  entry(copy_async, "cuMemcpyDtoDAsync_v2", \
      (DevicePtr to, DevicePtr from, size_t bytes, Stream stream)) \
  entry(graph_create, "cuGraphCreate", (Graph* graph, unsigned flags)) \
  entry(graph_destroy, "cuGraphDestroy", (Graph graph)) \
  entry(graph_nodes, "cuGraphGetNodes", (Graph graph, GraphNode* nodes, size_t* count)) \
  entry(add_memset, "cuGraphAddMemsetNode", \
      (GraphNode* node, Graph graph, const GraphNode* after, size_t count, \
       const MemsetNode* memset, Context context)) \
  entry(add_kernel, "cuGraphAddKernelNode_v2", \
      (GraphNode* node, Graph graph, const GraphNode* after, size_t count, \
       const KernelNode* kernel)) \
  entry(add_child, "cuGraphAddChildGraphNode", \
      (GraphNode* node, Graph graph, const GraphNode* after, size_t count, \
       Graph child)) \
  entry(instantiate, "cuGraphInstantiateWithFlags", \
      (GraphExec* exec, Graph graph, unsigned long long flags)) \
  entry(upload, "cuGraphUpload", (GraphExec exec, Stream stream)) \
  entry(launch, "cuGraphLaunch", (GraphExec exec, Stream stream)) \
  entry(exec_destroy, "cuGraphExecDestroy", (GraphExec exec))

// Drivers before CUDA 12.4 lack these: null.
#define DLMS_DRIVER_OPTIONAL(entry) \
  entry(conditional_handle, "cuGraphConditionalHandleCreate", \
      (unsigned long long* handle, Graph graph, Context context, \
       unsigned initial, unsigned flags)) \
  entry(add_node, "cuGraphAddNode", \
      (GraphNode* node, Graph graph, const GraphNode* after, size_t count, \
       ConditionalNode* parameters))
// clang-format on

struct Driver {
#define DLMS_DECLARE(member, symbol, parameters) int(*member) parameters = nullptr;
  DLMS_DRIVER_REQUIRED(DLMS_DECLARE)
  DLMS_DRIVER_OPTIONAL(DLMS_DECLARE)
#undef DLMS_DECLARE

  // DriverError, naming `what` and the driver's reason, unless `status` is success.
  void check(int status, const char* what) const;
};

// The driver, loaded by the first call. DriverError if there is none.
const Driver& driver();
// Takes the functions from `path` instead: another driver, or a stand-in of one for tests. Runs
// that exist keep the driver that made them. An empty path goes back to the system's driver.
void use_driver(const std::string& path);
// Why there is no driver, or an empty text.
std::string driver_problem();

// A function of a library that this process has loaded, or loads now. DriverError if there is none.
void* library_symbol(const std::string& path, const char* symbol);

// A device's primary context, the one that torch uses, retained while this lives.
class PrimaryContext {
 public:
  PrimaryContext(const Driver& driver, int ordinal);
  ~PrimaryContext();
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  Context get() const { return context_; }

 private:
  const Driver& driver_;
  int device_ = 0;
  Context context_ = nullptr;
};

// Makes a context current for a scope, whatever the thread's own is.
class ContextScope {
 public:
  ContextScope(const Driver& driver, Context context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
};

} // namespace dlms::cuda
