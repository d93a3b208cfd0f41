// Runs the kernels of kernels/cuda on the CPU; called from test_cuda_emulated.py through ctypes.

#include "fused_row_backward_kernel.cuh"
#include "fused_row_kernel.cuh"

namespace dlms::cuda {

alignas(16) double shared[kWarps * (kB + 64)];  // the block's shared memory

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S, class F, int kDepth, bool kEarly>
void run_depth(const Forward<S, F>& p) {
  if (p.f_cond != nullptr) {
    fused_row_kernel<S, F, kDepth, kEarly, true>(p);
  } else {
    fused_row_kernel<S, F, kDepth, kEarly, false>(p);
  }
}

template <class S, class F, bool kEarly>
void run_whole(const Forward<S, F>& p) {
  switch (p.depth) {
    case 1: run_depth<S, F, 1, false>(p); break;
    case 2: run_depth<S, F, 2, kEarly>(p); break;
    case 3: run_depth<S, F, 3, kEarly>(p); break;
    case 4: run_depth<S, F, 4, kEarly>(p); break;
    default: fused_row_any_kernel<S, F, true>(p);
  }
}

// As kernels/cuda/fused_row.cu launches, `most` groups at a time.
template <class S, class F>
void forward(
    void** t, const int64_t* size, bool m_to_ring, bool aligned, bool early, int64_t most) {
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
  const int64_t groups = size[0];
  p.n = size[1];
  p.packs = ceil_div(p.n, V);
  p.total = size[2];
  p.row_stride = size[3];
  p.depth = static_cast<int>(size[4]);
  p.m_to_ring = m_to_ring;
  aligned = aligned && p.n % V == 0 && p.total % V == 0;
  const auto kernel = [&] {
    if (!aligned) return fused_row_any_kernel<S, F, false>(p);
    if (early) return run_whole<S, F, true>(p);
    run_whole<S, F, false>(p);
  };
  const auto blocks = static_cast<unsigned>(ceil_div(p.packs, kThreads));
  for (int64_t first = 0; first < groups; first += most) {
    const auto count = static_cast<unsigned>(min(groups - first, most));
    for (unsigned y = 0; y < count; ++y) {
      for (unsigned x = 0; x < blocks; ++x) emulation::run_block({x, y}, kThreads, kernel);
    }
    p.skip(count);
  }
}

template <class S, class F>
void run_backward(const Backward<S, F>& p, bool aligned) {
  if (!aligned) return fused_row_backward_kernel<S, F, 0, false>(p);
  switch (p.depth) {
    case 2: fused_row_backward_kernel<S, F, 2, true>(p); break;
    case 3: fused_row_backward_kernel<S, F, 3, true>(p); break;
    case 4: fused_row_backward_kernel<S, F, 4, true>(p); break;
    default: fused_row_backward_kernel<S, F, 0, true>(p);
  }
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
  aligned = aligned && p.n % V == 0;
  const int64_t width = kB + p.depth;
  std::vector<double> partial(batch * p.tiles * width, std::nan(""));
  p.partial = partial.data();
  const int64_t most = 2;  // samples a launch, so that several launches are needed
  for (p.first = 0; p.first < batch; p.first += most) {
    for (unsigned y = 0; y < min(batch - p.first, most); ++y) {
      for (unsigned x = 0; x < p.tiles; ++x) {
        emulation::run_block({x, y}, kThreads, [&] { run_backward(p, aligned); });
      }
    }
  }
  const auto sum = [](const double* in, auto* out, int64_t outer, int64_t count, int64_t columns) {
    for (unsigned b = 0; b < ceil_div(outer * columns, kWarps); ++b) {
      emulation::run_block({b, 0}, kThreads, [&] {
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

// size: samples that have a row, elements of each, elements of a ring slot, row stride, depth. `early`:
// every slot before the row's is known. `most`: samples a launch.
extern "C" void dlms_forward(int dtype, void** tensors, const int64_t* size, bool m_to_ring,
    bool aligned, bool early, int64_t most) {
  dlms::cuda::with_types(dtype, [&](auto s, auto f) {
    dlms::cuda::forward<decltype(s), decltype(f)>(tensors, size, m_to_ring, aligned, early, most);
  });
}

// size: batch, elements of a sample, elements of a ring slot, row stride, depth.
extern "C" void dlms_backward(int dtype, void** tensors, const int64_t* size, bool aligned) {
  dlms::cuda::with_types(dtype, [&](auto s, auto f) {
    dlms::cuda::backward<decltype(s), decltype(f)>(tensors, size, aligned);
  });
}
