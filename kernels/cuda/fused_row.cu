// Host side of the fused row's forward: dlms::fused_row and dlms::fused_row_ on CUDA tensors.

#include <algorithm>
#include <atomic>

#include "fused_row_kernel.cuh"
#include "host.cuh"

namespace dlms::cuda {
namespace {

// Elements of the state up to which every ring slot is loaded before the row's slot is known. At
// 2^18 float32 elements the slot read too many costs about as long as the wait that it saves.
std::atomic<int64_t> early_slots_limit{int64_t{1} << 18};

template <class S, class F, int kDepth, bool kGuided>
void launch_depth(const Forward<S, F>& p, dim3 grid, cudaStream_t stream) {
  if constexpr (kDepth > 1) {
    if (p.total <= early_slots_limit.load(std::memory_order_relaxed)) {
      fused_row_kernel<S, F, kDepth, true, kGuided><<<grid, kThreads, 0, stream>>>(p);
      return;
    }
  }
  fused_row_kernel<S, F, kDepth, false, kGuided><<<grid, kThreads, 0, stream>>>(p);
}

template <class S, class F, bool kGuided>
void launch_whole(const Forward<S, F>& p, dim3 grid, cudaStream_t stream) {
  switch (p.depth) {
    case 1: launch_depth<S, F, 1, kGuided>(p, grid, stream); break;
    case 2: launch_depth<S, F, 2, kGuided>(p, grid, stream); break;
    case 3: launch_depth<S, F, 3, kGuided>(p, grid, stream); break;
    case 4: launch_depth<S, F, 4, kGuided>(p, grid, stream); break;
    default: fused_row_any_kernel<S, F, true><<<grid, kThreads, 0, stream>>>(p);
  }
}

template <class S, class F>
void launch_groups(const Forward<S, F>& p, int64_t groups, bool aligned, const Tensor& x) {
  constexpr const char* op = "dlms::fused_row";
  const int64_t blocks = ceil_div(p.packs, kThreads);
  const dim3 grid(grid_size(op, blocks), static_cast<unsigned>(groups));
  const cudaStream_t stream = current_stream(x);
  if (!aligned) {
    fused_row_any_kernel<S, F, false><<<grid, kThreads, 0, stream>>>(p);
  } else if (p.f_cond != nullptr) {
    launch_whole<S, F, true>(p, grid, stream);
  } else {
    launch_whole<S, F, false>(p, grid, stream);
  }
  check_launch(op, blocks * groups, x);
}

template <class S, class F>
void launch(Forward<S, F> p, int64_t groups, bool aligned, const Tensor& x) {
  for (int64_t first = 0; first < groups; first += kMaxGroups) {
    const int64_t count = std::min(groups - first, kMaxGroups);
    launch_groups(p, count, aligned, x);
    p.skip(count);
  }
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
    const int64_t groups = sizes.row_stride == 0 ? 1 : sizes.batch;
    p.n = sizes.row_stride == 0 ? sizes.total : sizes.per_sample;
    p.packs = ceil_div(p.n, V);
    p.total = sizes.total;
    p.row_stride = sizes.row_stride;
    p.depth = static_cast<int>(sizes.depth);
    p.m_to_ring = m_to_ring;
    const bool aligned = p.n % V == 0 && sizes.total % V == 0 &&
                         aligned16({p.f, p.f_cond, p.x, p.ring, p.x_next, p.m, p.input});
    launch(p, groups, aligned, x);
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

// For measuring and tests: states of up to `elements` load every ring slot early; negative changes
// nothing. Returns the limit that held before. The results have the same bits either way.
extern "C" __attribute__((visibility("default"))) int64_t dlms_early_slots_limit(int64_t elements) {
  auto& limit = dlms::cuda::early_slots_limit;
  return elements < 0 ? limit.load() : limit.exchange(elements);
}

STABLE_TORCH_LIBRARY_IMPL(dlms, CUDA, m) {
  m.impl("fused_row", TORCH_BOX(&dlms::cuda::fused_row));
  m.impl("fused_row_", TORCH_BOX(&dlms::cuda::fused_row_));
  m.impl("_fused_row_", TORCH_BOX(&dlms::cuda::fused_row_)); // without autograd's book-keeping
}
