// Compiled by tests/kernels/test_cuda_driver.py where a cuda.h is at hand: csrc/cuda/driver.h says
// what cuda.h says.
#include <cuda.h>

#include <cstddef>
#include <type_traits>
#include <utility>

#include "driver.h"

#define SAME(ours, our_field, theirs, their_field)                                         \
  static_assert(offsetof(ours, our_field) == offsetof(theirs, their_field), #their_field); \
  static_assert(                                                                           \
      sizeof(std::declval<ours>().our_field) == sizeof(std::declval<theirs>().their_field), "")

using dlms::cuda::ConditionalNode;
using dlms::cuda::KernelNode;
using dlms::cuda::MemsetNode;

static_assert(sizeof(KernelNode) == sizeof(CUDA_KERNEL_NODE_PARAMS_v2));
SAME(KernelNode, function, CUDA_KERNEL_NODE_PARAMS_v2, func);
SAME(KernelNode, grid[0], CUDA_KERNEL_NODE_PARAMS_v2, gridDimX);
SAME(KernelNode, block[0], CUDA_KERNEL_NODE_PARAMS_v2, blockDimX);
SAME(KernelNode, shared_bytes, CUDA_KERNEL_NODE_PARAMS_v2, sharedMemBytes);
SAME(KernelNode, arguments, CUDA_KERNEL_NODE_PARAMS_v2, kernelParams);
SAME(KernelNode, context, CUDA_KERNEL_NODE_PARAMS_v2, ctx);

static_assert(sizeof(MemsetNode) == sizeof(CUDA_MEMSET_NODE_PARAMS));
SAME(MemsetNode, value, CUDA_MEMSET_NODE_PARAMS, value);
SAME(MemsetNode, element_size, CUDA_MEMSET_NODE_PARAMS, elementSize);
SAME(MemsetNode, width, CUDA_MEMSET_NODE_PARAMS, width);

static_assert(sizeof(ConditionalNode) == sizeof(CUgraphNodeParams));
SAME(ConditionalNode, type, CUgraphNodeParams, type);
SAME(ConditionalNode, handle, CUgraphNodeParams, conditional.handle);
SAME(ConditionalNode, condition, CUgraphNodeParams, conditional.type);
SAME(ConditionalNode, size, CUgraphNodeParams, conditional.size);
SAME(ConditionalNode, bodies, CUgraphNodeParams, conditional.phGraph_out);
SAME(ConditionalNode, reserved2, CUgraphNodeParams, reserved2);
static_assert(dlms::cuda::kNodeConditional == CU_GRAPH_NODE_TYPE_CONDITIONAL);
static_assert(dlms::cuda::kConditionWhile == CU_GRAPH_COND_TYPE_WHILE);
static_assert(dlms::cuda::kConditionAssignDefault == CU_GRAPH_COND_ASSIGN_DEFAULT);
static_assert(dlms::cuda::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(dlms::cuda::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(dlms::cuda::kAutoFreeOnLaunch == CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
static_assert(std::is_same_v<dlms::cuda::DevicePtr, CUdeviceptr>);
static_assert(std::is_same_v<dlms::cuda::Event, CUevent>);
static_assert(std::is_same_v<dlms::cuda::Graph, CUgraph>);
static_assert(std::is_same_v<dlms::cuda::Stream, CUstream>);
