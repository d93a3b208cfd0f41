// The fused row on the CPU: one pass over memory, bit for bit what ops/reference.py computes.
//
// This header is what the operator library and the sampling loop see; the arithmetic is in
// fused_row_kernel.h, compiled once per instruction set (isa.cpp) and chosen at run time
// (dispatch.cpp). Everything works on raw contiguous memory and knows nothing of torch.
#pragma once

#include <cstdint>

#include "columns.h"

namespace dlms {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// iPNDM and DEIS on a flow combine all outputs so far, one less than the steps. The kernels keep
// the slot pointers of a row on the stack.
constexpr int64_t kMaxDepth = 4096;

// One row over `batch` samples of `inner` elements. The state dtype is float32, or float64 with a
// float64 network.
struct RowArgs {
  Dtype state = Dtype::kFloat32;
  Dtype network = Dtype::kFloat32;
  int64_t batch = 0;
  int64_t inner = 0;
  int64_t depth = 1;
  // Results that nobody will read need not be written: m when no later row weighs it, the input
  // after the last row. The loop knows; the operators always write.
  bool store_m = true;
  bool store_input = true;
  const void* row = nullptr;     // [6 + depth], or [batch, 6 + depth]; state dtype
  bool per_sample = false;       // which of the two
  const void* f = nullptr;       // [batch, inner], network dtype
  const void* f_cond = nullptr;  // the same, or null: no guidance
  const void* x = nullptr;       // [batch, inner]
  void* x_next = nullptr;        // [batch, inner]; may be x
  const void* ring = nullptr;    // [depth, batch, inner]
  void* m = nullptr;             // [batch, inner], or null: write into the slot of `ring`
  void* network_input = nullptr; // [batch, inner], network dtype; may be f
};

// Gradients of one row. `partial` holds one row of doubles per chunk, summed in order by `finish`.
struct BackwardArgs {
  RowArgs row;                       // f, f_cond, x, ring and the row of the forward pass
  const void* grad_x_next = nullptr; // [batch, inner], state dtype
  const void* grad_m = nullptr;      // [batch, inner], state dtype
  const void* grad_input = nullptr;  // [batch, inner], network dtype
  void* grad_f = nullptr;            // [batch, inner], network dtype
  void* grad_f_cond = nullptr;       // the same; null exactly when f_cond is
  void* grad_x = nullptr;            // [batch, inner], state dtype
  void* grad_ring = nullptr;         // [depth, batch, inner], state dtype, zeroed by the caller
  double* partial = nullptr;         // [segments * chunks, 6 + depth]
};

// Elements that one backward chunk sums; fixed, so that sums do not depend on the thread count.
constexpr int64_t kChunk = 8192;

// A row of its own for every sample, or one for all of the memory.
inline int64_t segments(const RowArgs& args) {
  return args.per_sample ? args.batch : 1;
}
inline int64_t segment_size(const RowArgs& args) {
  return args.per_sample ? args.inner : args.batch * args.inner;
}
inline int64_t chunks(const RowArgs& args) {
  return (segment_size(args) + kChunk - 1) / kChunk;
}

struct Kernels {
  const char* name;
  // Elements [begin, end) of the flattened batch.
  void (*forward)(const RowArgs& args, int64_t begin, int64_t end);
  // Chunks [begin, end) of segments(args) * chunks(args).
  void (*backward)(const BackwardArgs& args, int64_t begin, int64_t end);
  // x_next = x and network_input = scale * x: the start of a run. scale: [] or, per sample,
  // [batch].
  void (*scale)(const RowArgs& args, const void* scale, int64_t begin, int64_t end);
};

// The best instruction set of this machine, or the one named by DLMS_CPU_ISA
// ("baseline", "avx2", "avx512"); chosen once.
const Kernels& kernels();

// First row whose slot is not one of 0 .. depth-1, or -1. Read before any pointer is formed from
// it.
int64_t first_bad_slot(const RowArgs& args);

// Elements below which a second thread costs more than it saves, and the unit handed to threads.
constexpr int64_t kBlock = 4096;
constexpr int64_t kGrain = 131072;

} // namespace dlms
