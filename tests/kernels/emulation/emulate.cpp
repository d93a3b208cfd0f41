// Runs the kernels of kernels/cuda on the CPU; called from test_cuda_emulated.py through ctypes.

#include "fused_row_backward_kernel.cuh"
#include "fused_row_kernel.cuh"

namespace dlms::cuda {

alignas(16) double shared[kWarps * (kColB + 64)];  // the block's shared memory

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S, class F>
void forward(void** t, const int64_t* size, bool m_to_ring, bool aligned) {
  constexpr int V = kLanes<F>;
  Forward<S, F> p{};
  p.f = static_cast<const F*>(t[0]);
  p.f_cond = static_cast<const F*>(t[1]);
  p.x = static_cast<const S*>(t[2]);
  p.ring = static_cast<const S*>(t[3]);
  p.row = static_cast<const S*>(t[4]);
  p.x_next = static_cast<S*>(t[5]);
  p.m = static_cast<S*>(t[6]);
  p.input = static_cast<F*>(t[7]);
  p.samples = size[0];
  p.n = size[1];
  p.packs = ceil_div(p.n, V);
  p.total = size[2];
  p.row_stride = size[3];
  p.depth = static_cast<int>(size[4]);
  p.m_to_ring = m_to_ring;
  p.aligned = aligned && p.n % V == 0 && p.total % V == 0;
  const auto kernel = [&p] {
    switch (p.depth) {
      case 1: fused_row_kernel<S, F, 1>(p); break;
      case 2: fused_row_kernel<S, F, 2>(p); break;
      case 3: fused_row_kernel<S, F, 3>(p); break;
      case 4: fused_row_kernel<S, F, 4>(p); break;
      default: fused_row_kernel<S, F, 0>(p);
    }
  };
  const int64_t blocks = ceil_div(p.samples * p.packs, kThreads);
  for (int64_t b = 0; b < blocks; ++b) emulation::run_block(b, kThreads, kernel);
}

template <class S, class F>
void backward(void** t, const int64_t* size, bool aligned) {
  constexpr int V = kLanes<F>;
  Backward<S, F> p{};
  p.grad_x_next = static_cast<const S*>(t[0]);
  p.grad_m = static_cast<const S*>(t[1]);
  p.grad_input = static_cast<const F*>(t[2]);
  p.f = static_cast<const F*>(t[3]);
  p.f_cond = static_cast<const F*>(t[4]);
  p.x = static_cast<const S*>(t[5]);
  p.ring = static_cast<const S*>(t[6]);
  p.row = static_cast<const S*>(t[7]);
  p.grad_f = static_cast<F*>(t[8]);
  p.grad_f_cond = static_cast<F*>(t[9]);
  p.grad_x = static_cast<S*>(t[10]);
  p.grad_ring = static_cast<S*>(t[11]);
  S* grad_row = static_cast<S*>(t[12]);
  const int64_t batch = size[0];
  p.n = size[1];
  p.tiles = ceil_div(p.n, static_cast<int64_t>(kThreads) * V);
  p.total = size[2];
  p.row_stride = size[3];
  p.depth = static_cast<int>(size[4]);
  p.aligned = aligned && p.n % V == 0;
  const int64_t width = kColB + p.depth;
  std::vector<double> partial(batch * p.tiles * width, std::nan(""));
  p.partial = partial.data();
  for (int64_t b = 0; b < batch * p.tiles; ++b) {
    emulation::run_block(b, kThreads, [&p] { fused_row_backward_kernel<S, F>(p); });
  }
  const auto sum = [](const double* in, auto* out, int64_t outer, int64_t count, int64_t columns) {
    for (int64_t b = 0; b < ceil_div(outer * columns, kWarps); ++b) {
      emulation::run_block(b, kThreads, [&] {
        sum_middle_kernel(in, out, outer, count, static_cast<int>(columns));
      });
    }
  };
  if (p.row_stride != 0) {
    sum(partial.data(), grad_row, batch, p.tiles, width);
    return;
  }
  std::vector<double> each(batch * width, std::nan(""));
  sum(partial.data(), each.data(), batch, p.tiles, width);
  sum(each.data(), grad_row, 1, batch, width);
}

template <class Body>
void with_types(int dtype, Body body) {
  switch (dtype) {
    case 0: body(float{}, float{}); break;
    case 1: body(float{}, __nv_bfloat16{}); break;
    case 2: body(float{}, __half{}); break;
    default: body(double{}, double{});
  }
}

}  // namespace
}  // namespace dlms::cuda

// size: samples that have a row, elements of each, elements of a ring slot, row stride, depth.
extern "C" void dlms_forward(
    int dtype, void** tensors, const int64_t* size, bool m_to_ring, bool aligned) {
  dlms::cuda::with_types(dtype, [&](auto s, auto f) {
    dlms::cuda::forward<decltype(s), decltype(f)>(tensors, size, m_to_ring, aligned);
  });
}

// size: batch, elements of a sample, elements of a ring slot, row stride, depth.
extern "C" void dlms_backward(int dtype, void** tensors, const int64_t* size, bool aligned) {
  dlms::cuda::with_types(dtype, [&](auto s, auto f) {
    dlms::cuda::backward<decltype(s), decltype(f)>(tensors, size, aligned);
  });
}
