// Host side of the fused row's forward: dlms::fused_row and dlms::fused_row_ on CUDA tensors.

#include "fused_row_kernel.cuh"
#include "host.cuh"

namespace dlms::cuda {
namespace {

template <class S, class F>
void launch(const Forward<S, F>& p, const Tensor& x) {
  constexpr const char* op = "dlms::fused_row";
  const int64_t blocks = ceil_div(p.samples * p.packs, kThreads);
  const unsigned grid = grid_size(op, blocks);
  const cudaStream_t stream = current_stream(x);
  // Depths 1 to 4 cover every published solver up to iPNDM-4. There all history loads are in flight
  // at once; the general kernel takes them four at a time.
  switch (p.depth) {
    case 1: fused_row_kernel<S, F, 1><<<grid, kThreads, 0, stream>>>(p); break;
    case 2: fused_row_kernel<S, F, 2><<<grid, kThreads, 0, stream>>>(p); break;
    case 3: fused_row_kernel<S, F, 3><<<grid, kThreads, 0, stream>>>(p); break;
    case 4: fused_row_kernel<S, F, 4><<<grid, kThreads, 0, stream>>>(p); break;
    default: fused_row_kernel<S, F, 0><<<grid, kThreads, 0, stream>>>(p);
  }
  check_launch(op, blocks, x);
}

// m: [*x.shape] or the ring itself; x_next may be x. All tensors contiguous.
void run(const Tensor& f, const OptionalTensor& f_cond, const Tensor& x, const Tensor& ring,
    const Tensor& row, const Tensor& x_next, const Tensor& m, bool m_to_ring, const Tensor& input,
    const Sizes& sizes) {
  if (sizes.total == 0) return;
  with_types("dlms::fused_row", x.scalar_type(), f.scalar_type(), [&](auto state, auto network) {
    using S = decltype(state);
    using F = decltype(network);
    constexpr int V = kLanes<F>;
    Forward<S, F> p{};
    p.f = in<F>(f);
    p.f_cond = f_cond.has_value() ? in<F>(*f_cond) : nullptr;
    p.x = in<S>(x);
    p.ring = in<S>(ring);
    p.row = in<S>(row);
    p.x_next = out<S>(x_next);
    p.m = out<S>(m);
    p.input = out<F>(input);
    p.samples = sizes.row_stride == 0 ? 1 : sizes.batch;
    p.n = sizes.row_stride == 0 ? sizes.total : sizes.per_sample;
    p.packs = ceil_div(p.n, V);
    p.total = sizes.total;
    p.row_stride = sizes.row_stride;
    p.depth = static_cast<int>(sizes.depth);
    p.m_to_ring = m_to_ring;
    p.aligned = p.n % V == 0 && sizes.total % V == 0 &&
                aligned16({p.f, p.f_cond, p.x, p.ring, p.x_next, p.m, p.input});
    launch(p, x);
  });
}

std::tuple<Tensor, Tensor, Tensor> fused_row(const Tensor& f, const OptionalTensor& f_cond,
    const Tensor& x, const Tensor& ring, const Tensor& row) {
  constexpr const char* op = "dlms::fused_row";
  const Sizes sizes = check_state(op, x, ring, row);
  check_branches(op, f, f_cond, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor x_next = new_like(x, x.scalar_type());
  const Tensor m = new_like(x, x.scalar_type());
  const Tensor input = new_like(x, f.scalar_type());
  run(dense(f), dense(f_cond), dense(x), dense(ring), dense(row), x_next, m, false, input, sizes);
  return {x_next, m, input};
}

void fused_row_(const Tensor& f, const OptionalTensor& f_cond, const Tensor& x, const Tensor& ring,
    const Tensor& row, const Tensor& network_input) {
  constexpr const char* op = "dlms::fused_row_";
  const Sizes sizes = check_state(op, x, ring, row);
  check_branches(op, f, f_cond, x);
  check_like_x(op, "network_input", network_input, x);
  STD_TORCH_CHECK(network_input.scalar_type() == f.scalar_type(), op,
      ": network_input must have the dtype of f");
  check_contiguous(op, "x", x);
  check_contiguous(op, "ring", ring);
  check_contiguous(op, "network_input", network_input);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  run(dense(f), dense(f_cond), x, ring, dense(row), x, ring, true, network_input, sizes);
}

} // namespace
} // namespace dlms::cuda

STABLE_TORCH_LIBRARY_IMPL(dlms, CUDA, m) {
  m.impl("fused_row", TORCH_BOX(&dlms::cuda::fused_row));
  m.impl("fused_row_", TORCH_BOX(&dlms::cuda::fused_row_));
}
