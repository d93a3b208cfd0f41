// Host side of the fused row's backward: dlms::fused_row_backward on CUDA tensors.

#include <algorithm>

#include "fused_row_backward_kernel.cuh"
#include "host.cuh"

namespace dlms::cuda {
namespace {

template <class Out>
void sum_middle(
    const double* in, Out* out, int64_t outer, int64_t count, int64_t width, const Tensor& x) {
  constexpr const char* op = "dlms::fused_row_backward (sums)";
  const int64_t blocks = ceil_div(outer * width, kWarps);
  sum_middle_kernel<Out><<<grid_size(op, blocks), kThreads, 0, current_stream(x)>>>(
      in, out, outer, count, static_cast<int>(width));
  check_launch(op, blocks, x);
}

template <class S, class F>
void launch_tiles(
    const Backward<S, F>& p, dim3 grid, size_t shared, bool aligned, const Tensor& x) {
  const cudaStream_t stream = current_stream(x);
  if (!aligned) {
    fused_row_backward_kernel<S, F, 0, false><<<grid, kThreads, shared, stream>>>(p);
    return;
  }
  if constexpr (sizeof(S) == 4) {
    if (p.depth == 2) {
      fused_row_backward_kernel<S, F, 2, true><<<grid, kThreads, shared, stream>>>(p);
      return;
    }
  }
  if constexpr (sizeof(F) == 4) { // eight elements a thread: more slots do not fit the registers
    if (p.depth == 3) {
      fused_row_backward_kernel<S, F, 3, true><<<grid, kThreads, shared, stream>>>(p);
      return;
    }
    if (p.depth == 4) {
      fused_row_backward_kernel<S, F, 4, true><<<grid, kThreads, shared, stream>>>(p);
      return;
    }
  }
  fused_row_backward_kernel<S, F, 0, true><<<grid, kThreads, shared, stream>>>(p);
}

template <class S, class F>
void launch(Backward<S, F> p, S* grad_row, bool aligned, const Tensor& x, const Sizes& sizes) {
  constexpr const char* op = "dlms::fused_row_backward";
  const int64_t width = kB + sizes.depth;
  const size_t shared = sizeof(double) * static_cast<size_t>(kWarps * width);
  for (p.first = 0; p.first < sizes.batch; p.first += kMaxGroups) {
    const int64_t samples = std::min(sizes.batch - p.first, kMaxGroups);
    const dim3 grid(grid_size(op, p.tiles), static_cast<unsigned>(samples));
    launch_tiles(p, grid, shared, aligned, x);
    check_launch(op, samples * p.tiles, x);
  }
  if (sizes.row_stride != 0) {
    sum_middle(p.partial, grad_row, sizes.batch, p.tiles, width, x);
    return;
  }
  const Tensor each = torch::stable::new_empty(x, {sizes.batch, width}, ScalarType::Double);
  sum_middle(p.partial, out<double>(each), sizes.batch, p.tiles, width, x);
  sum_middle(in<double>(each), grad_row, 1, sizes.batch, width, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_row_backward(const Tensor& grad_x_next,
    const Tensor& grad_m, const Tensor& grad_input, const Tensor& f, const OptionalTensor& f_cond,
    const Tensor& x, const Tensor& ring, const Tensor& row) {
  constexpr const char* op = "dlms::fused_row_backward";
  const Sizes sizes = check_state(op, x, ring, row);
  check_branches(op, f, f_cond, x);
  check_like_x(op, "grad_x_next", grad_x_next, x);
  check_like_x(op, "grad_m", grad_m, x);
  check_like_x(op, "grad_input", grad_input, x);
  STD_TORCH_CHECK(grad_x_next.scalar_type() == x.scalar_type() &&
                      grad_m.scalar_type() == x.scalar_type() &&
                      grad_input.scalar_type() == f.scalar_type(),
      op, ": grad_x_next and grad_m must have the dtype of x, grad_input that of f");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor grad_f = new_like(f, f.scalar_type());
  const Tensor grad_f_cond =
      f_cond.has_value() ? new_like(f, f.scalar_type()) : torch::stable::new_empty(f, {0});
  const Tensor grad_x = new_like(x, x.scalar_type());
  const Tensor grad_ring = new_like(ring, x.scalar_type());
  if (sizes.total == 0) {
    const Tensor none = torch::stable::new_zeros(row, row.sizes());
    return {grad_f, grad_f_cond, grad_x, grad_ring, none};
  }
  const Tensor grad_row = new_like(row, x.scalar_type());
  // Named, so that dense copies outlive the launch.
  const Tensor gx = dense(grad_x_next), gm = dense(grad_m), gi = dense(grad_input);
  const Tensor f_in = dense(f), x_in = dense(x), ring_in = dense(ring), row_in = dense(row);
  const OptionalTensor cond_in = dense(f_cond);
  with_types(op, x.scalar_type(), f.scalar_type(), [&](auto state, auto network) {
    using S = decltype(state);
    using F = decltype(network);
    constexpr int V = kLanes<F>;
    Backward<S, F> p{};
    p.grad_x_next = in<S>(gx);
    p.grad_m = in<S>(gm);
    p.grad_input = in<F>(gi);
    p.f = in<F>(f_in);
    p.f_cond = cond_in.has_value() ? in<F>(*cond_in) : nullptr;
    p.x = in<S>(x_in);
    p.ring = in<S>(ring_in);
    p.row = in<S>(row_in);
    p.grad_f = out<F>(grad_f);
    p.grad_f_cond = f_cond.has_value() ? out<F>(grad_f_cond) : nullptr;
    p.grad_x = out<S>(grad_x);
    p.grad_ring = out<S>(grad_ring);
    p.n = sizes.per_sample;
    p.tiles = ceil_div(p.n, static_cast<int64_t>(kThreads) * V);
    p.total = sizes.total;
    p.row_stride = sizes.row_stride;
    p.depth = static_cast<int>(sizes.depth);
    const bool aligned =
        p.n % V == 0 && aligned16({p.grad_x_next, p.grad_m, p.grad_input, p.f, p.f_cond, p.x,
                            p.ring, p.grad_f, p.grad_f_cond, p.grad_x, p.grad_ring});
    const int64_t width = kB + sizes.depth;
    const Tensor partial =
        torch::stable::new_empty(x, {sizes.batch * p.tiles * width}, ScalarType::Double);
    p.partial = out<double>(partial);
    launch(p, out<S>(grad_row), aligned, x, sizes);
  });
  return {grad_f, grad_f_cond, grad_x, grad_ring, grad_row};
}

} // namespace
} // namespace dlms::cuda

STABLE_TORCH_LIBRARY_IMPL(dlms, CUDA, m) {
  m.impl("fused_row_backward", TORCH_BOX(&dlms::cuda::fused_row_backward));
}
