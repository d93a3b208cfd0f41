// Host-side checks and launch helpers of the CUDA ops. Only the stable ABI of PyTorch is used, so
// one build serves every PyTorch from 2.11 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "row_math.cuh"

namespace dlms::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sizes of one call. Shapes: x [batch, ...] with `per_sample` elements each, ring [depth, batch,
// ...].
struct Sizes {
  int64_t batch;
  int64_t per_sample;
  int64_t total;
  int64_t depth;
  int64_t row_stride; // elements from one sample's row to the next; 0 when all share one row
};

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  // Written out: torch 2.11 and 2.12 have different names for the macro that checks the code.
  const int32_t device = t.get_device_index();
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
      "dlms: torch gives no current stream of cuda:", device);
  return static_cast<cudaStream_t>(stream);
}

// Call right after a launch: a bad configuration shows only here.
inline void check_launch(const char* op, int64_t blocks, const Tensor& x) {
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, op, ": launch of ", blocks,
      " blocks on cuda:", x.get_device_index(), " for ", x.numel(),
      " elements failed: ", cudaGetErrorString(status));
}

inline unsigned grid_size(const char* op, int64_t blocks) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= 0x7fffffff, op, ": ", blocks,
      " blocks are needed, a launch takes at most 2147483647; split the batch");
  return static_cast<unsigned>(blocks);
}

constexpr int64_t kMaxGroups = 65535; // gridDim.y of one launch

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) {
    text += (d == 0 ? "" : ", ") + std::to_string(t.size(d));
  }
  return text + "]";
}

inline void check_like_x(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(same_shape(t, x), op, ": ", name, " is ", shape_text(t), ", x is ", shape_text(x),
      "; they must have one shape");
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), op, ": ", name,
      " must be on the device of x, cuda:", x.get_device_index());
}

// Checks x, ring and row and returns the sizes. ring must be [depth, *x.shape], 1 <= depth <=
// kMaxDepth.
inline Sizes check_state(const char* op, const Tensor& x, const Tensor& ring, const Tensor& row) {
  STD_TORCH_CHECK(x.is_cuda(), op, ": x must be a CUDA tensor");
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have a batch dimension");
  const ScalarType state = x.scalar_type();
  STD_TORCH_CHECK(state == ScalarType::Float || state == ScalarType::Double, op,
      ": x must be float32 or float64");
  STD_TORCH_CHECK(ring.scalar_type() == state && row.scalar_type() == state, op,
      ": ring and row must have the dtype of x");
  STD_TORCH_CHECK(ring.is_cuda() && row.is_cuda() &&
                      ring.get_device_index() == x.get_device_index() &&
                      row.get_device_index() == x.get_device_index(),
      op, ": ring and row must be on the device of x, cuda:", x.get_device_index());
  bool fits = ring.dim() == x.dim() + 1;
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = ring.size(d + 1) == x.size(d);
  STD_TORCH_CHECK(fits && ring.size(0) >= 1 && ring.size(0) <= kMaxDepth, op, ": ring is ",
      shape_text(ring), ", expected [depth, *", shape_text(x), "] with 1 <= depth <= ", kMaxDepth);

  Sizes sizes{x.size(0), 0, x.numel(), ring.size(0), 0};
  sizes.per_sample = sizes.batch == 0 ? 0 : sizes.total / sizes.batch;
  const int64_t width = kB + sizes.depth;
  const bool shared = row.dim() == 1 && row.size(0) == width;
  const bool each = row.dim() == 2 && row.size(0) == sizes.batch && row.size(1) == width;
  STD_TORCH_CHECK(shared || each, op, ": row is ", shape_text(row), ", expected [", width, "] or [",
      sizes.batch, ", ", width, "]");
  sizes.row_stride = each ? width : 0;
  return sizes;
}

// f and f_cond: the shape and device of x, one dtype.
inline void check_branches(
    const char* op, const Tensor& f, const OptionalTensor& f_cond, const Tensor& x) {
  check_like_x(op, "f", f, x);
  if (!f_cond.has_value()) return;
  check_like_x(op, "f_cond", *f_cond, x);
  STD_TORCH_CHECK(
      f_cond->scalar_type() == f.scalar_type(), op, ": f_cond must have the dtype of f");
}

inline void check_contiguous(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is written in place and must be contiguous");
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor dense(const OptionalTensor& t) {
  return t.has_value() ? OptionalTensor(dense(*t)) : t;
}

inline Tensor new_like(const Tensor& like, ScalarType dtype) {
  const auto sizes = like.sizes();
  return torch::stable::new_empty(like, sizes, dtype);
}

inline bool aligned16(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  }
  return true;
}

template <class T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls body(S{}, F{}) with the C++ types of the state and of the network: float32 with float32,
// bfloat16 or float16, or float64 with float64.
template <class Body>
void with_types(const char* op, ScalarType state, ScalarType network, Body body) {
  if (state == ScalarType::Double) {
    STD_TORCH_CHECK(
        network == ScalarType::Double, op, ": a float64 state needs a float64 network output");
    body(double{}, double{});
    return;
  }
  switch (network) {
    case ScalarType::Float: body(float{}, float{}); break;
    case ScalarType::Half: body(float{}, __half{}); break;
    case ScalarType::BFloat16: body(float{}, __nv_bfloat16{}); break;
    default:
      STD_TORCH_CHECK(false, op, ": f must be float32, bfloat16 or float16 with a float32 state");
  }
}

} // namespace dlms::cuda
