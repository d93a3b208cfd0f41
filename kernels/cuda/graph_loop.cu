// The kernel that turns a captured evaluation into a loop: csrc/cuda/graph_run.h, loop_graph.
// Needs CUDA 12.4 or newer, as WHILE nodes do.
#include <cuda_runtime.h>

namespace {

// One thread. handle: of the WHILE node; counter: evaluations done, in device memory; count: of the
// run. The condition is read by the node after each pass.
__global__ void advance(cudaGraphConditionalHandle handle, int* counter, const int* count) {
  const int done = *counter + 1;
  *counter = done;
  cudaGraphSetConditional(handle, done < *count ? 1u : 0u);
}

} // namespace

// The kernel as a CUfunction of the current device, for a graph that is built elsewhere; returns a
// cudaError_t. Plain C, found by name.
extern "C" __attribute__((visibility("default"))) int dlms_loop_advance(void** function) {
  cudaFunction_t found = nullptr;
  const cudaError_t status = cudaGetFuncBySymbol(&found, reinterpret_cast<const void*>(&advance));
  *function = found;
  return static_cast<int>(status);
}
