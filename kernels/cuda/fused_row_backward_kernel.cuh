// Backward of the fused row: elementwise gradients and the sums for the row's coefficients.
//
// With g_x, g_m, g_i the gradients of x_next, m and the network input (ops/reference.py is the
// definition, and the elementwise results have its bits):
//
//   G      = g_x + c_in * g_i                     gradient of x_next, all paths
//   M      = g_m + b_0 * G                        gradient of m
//   dF     = c_out * M                            grad_f = dF - guidance * dF, grad_f_cond =
//   guidance * dF grad_x = a * G + c_skip * M grad_ring[slot - k] = b_k * G (k >= 1),
//   grad_ring[slot] = 0 grad_row = sums of M x, M F, G x, g_i x_next, dF (f_cond - f), 0, G m, G
//   m_{n-1}, ...
//
// The sums run in double, without atomics, in three fixed stages: a tile of one sample (lanes, warp
// shuffles, warps in order), the tiles of a sample, and, for a row that all samples share, the
// samples. The order depends on the size of a sample alone, so a sample gives the same bits alone
// or in any batch.

#pragma once

#include "row_math.cuh"

namespace dlms::cuda {

constexpr int kHistoryGroup = 2; // slots in flight; 4 would cost registers without need: ring
                                 // slots are both read and written here

template <class S, class F>
struct Backward {
  const S* grad_x_next; // [batch, n], as all below
  const S* grad_m;
  const F* grad_input;
  const F* f;
  const F* f_cond; // or null
  const S* x;
  const S* ring; // [depth, total]
  const S* row;  // [batch or 1, kColB + depth]
  F* grad_f;
  F* grad_f_cond; // or null
  S* grad_x;
  S* grad_ring;    // [depth, total]
  double* partial; // [batch, tiles, kColB + depth]
  int64_t n;
  int64_t first; // sample of blockIdx.y 0
  int64_t tiles; // blockIdx.x: tiles of kThreads * V elements in a sample
  int64_t total;
  int64_t row_stride;
  int depth;
  bool aligned;
};

// Sum over a warp; the same tree for every warp. Valid in lane 0.
__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
  return v;
}

template <int V, class A, class B>
__device__ __forceinline__ double dot(const A& u, const B& v) {
  double sum = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    sum += static_cast<double>(u.at[j]) * static_cast<double>(v.at[j]);
  }
  return sum;
}

// Values of one thread that the history loop needs. count is 0 for threads past the sample's end:
// their values are zero, so they add nothing, and they stay for the shuffles.
template <class S, int V>
struct Place {
  int64_t at;
  bool whole;
  int count;
  Pack<S, V> grad_next;
  Pack<S, V> x_next;
};

// Slots k0 .. k0 + G - 1: x_next += b_k m_{n-k}, grad_ring, and the warp's sum of G m_{n-k}.
// The gradient to a zero weight reads its slot too, or learning could never leave zero; what is
// not finite in a slot of weight zero (never written, perhaps) counts as zero.
template <int G, int V, class S, class F>
__device__ __forceinline__ void history(
    const Backward<S, F>& p, Place<S, V>& t, const S* row, int slot, int k0, double* warp_sums) {
  Pack<S, V> past[G];
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (k0 + g < p.depth) {
      const int64_t base = slot_back(slot, k0 + g, p.depth) * p.total;
      past[g] = load<S, V>(p.ring + base + t.at, t.whole, t.count);
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (k0 + g >= p.depth) break;
    const S b = row[kColB + k0 + g];
    Pack<S, V> grad;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (b != S(0)) {
        t.x_next.at[j] = add(t.x_next.at[j], mul(b, past[g].at[j]));
      } else if (!isfinite(past[g].at[j])) {
        past[g].at[j] = S(0);
      }
      grad.at[j] = mul(b, t.grad_next.at[j]);
    }
    const int64_t base = slot_back(slot, k0 + g, p.depth) * p.total;
    store<S, V>(p.grad_ring + base + t.at, grad, t.whole, t.count);
    const double sum = warp_sum(dot<V>(t.grad_next, past[g]));
    if (threadIdx.x % 32 == 0) warp_sums[kColB + k0 + g] = sum;
  }
}

// One block: one tile of one sample.
template <class S, class F>
// Two blocks a multiprocessor at least, so up to 128 registers: without the 2, ptxas aims at 64 for
// float32 on sm_80 and spills.
__global__ void __launch_bounds__(kThreads, 2) fused_row_backward_kernel(const Backward<S, F> p) {
  extern __shared__ double shared[]; // [kWarps, width]
  constexpr int V = kLanes<F>;
  const int width = kColB + p.depth;
  double* warp_sums = shared + threadIdx.x / 32 * width;
  const bool lane0 = threadIdx.x % 32 == 0;
  const int64_t sample = p.first + blockIdx.y;
  const int64_t tile = blockIdx.x;
  const int64_t first = (tile * kThreads + threadIdx.x) * V;
  const int64_t left = p.n - first;
  Place<S, V> t;
  t.count = left >= V ? V : (left > 0 ? static_cast<int>(left) : 0);
  t.whole = p.aligned && t.count == V;
  t.at = t.count > 0 ? sample * p.n + first : 0;
  const S* row = p.row + sample * p.row_stride;

  const Pack<S, V> x = load<S, V>(p.x + t.at, t.whole, t.count);
  const Pack<F, V> f = load<F, V>(p.f + t.at, t.whole, t.count);
  const Pack<S, V> g_x = load<S, V>(p.grad_x_next + t.at, t.whole, t.count);
  const Pack<S, V> g_m = load<S, V>(p.grad_m + t.at, t.whole, t.count);
  const Pack<F, V> g_i = load<F, V>(p.grad_input + t.at, t.whole, t.count);
  const bool guided = p.f_cond != nullptr;
  Pack<F, V> f_cond = f;
  if (guided) f_cond = load<F, V>(p.f_cond + t.at, t.whole, t.count);

  const S c_skip = row[kColSkip];
  const S c_out = row[kColOut];
  const S a = row[kColA];
  const S c_in = row[kColIn];
  const S guidance = row[kColGuidance];
  const S b0 = row[kColB];
  const int slot = ring_slot(row[kColSlot], p.depth);

  Pack<S, V> mixed, m, grad_m, branch, grad_mixed, grad_x, grad_input;
  Pack<F, V> grad_f, grad_f_cond;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const S uncond = to_state<S>(f.at[j]);
    branch.at[j] = sub(to_state<S>(f_cond.at[j]), uncond);
    mixed.at[j] = guided ? add(uncond, mul(guidance, branch.at[j])) : uncond;
    m.at[j] = add(mul(c_skip, x.at[j]), mul(c_out, mixed.at[j]));
    t.x_next.at[j] = mul(a, x.at[j]);
    if (b0 != S(0)) t.x_next.at[j] = add(t.x_next.at[j], mul(b0, m.at[j]));
    grad_input.at[j] = to_state<S>(g_i.at[j]);
    t.grad_next.at[j] = add(g_x.at[j], mul(c_in, grad_input.at[j]));
    grad_m.at[j] = add(g_m.at[j], mul(b0, t.grad_next.at[j]));
    grad_mixed.at[j] = mul(c_out, grad_m.at[j]);
    grad_x.at[j] = add(mul(a, t.grad_next.at[j]), mul(c_skip, grad_m.at[j]));
    const S scaled = mul(guidance, grad_mixed.at[j]);
    grad_f.at[j] = From<F>::state(guided ? sub(grad_mixed.at[j], scaled) : grad_mixed.at[j]);
    grad_f_cond.at[j] = From<F>::state(scaled);
  }
  store<S, V>(p.grad_x + t.at, grad_x, t.whole, t.count);
  store<F, V>(p.grad_f + t.at, grad_f, t.whole, t.count);
  if (guided) store<F, V>(p.grad_f_cond + t.at, grad_f_cond, t.whole, t.count);
  Pack<S, V> zero{};
  store<S, V>(p.grad_ring + slot * p.total + t.at, zero, t.whole, t.count);

  const double sum_skip = warp_sum(dot<V>(grad_m, x));
  const double sum_out = warp_sum(dot<V>(grad_m, mixed));
  const double sum_a = warp_sum(dot<V>(t.grad_next, x));
  const double sum_guidance = guided ? warp_sum(dot<V>(grad_mixed, branch)) : 0.0;
  const double sum_b0 = warp_sum(dot<V>(t.grad_next, m));
  for (int k = 1; k < p.depth; k += kHistoryGroup) {
    history<kHistoryGroup, V>(p, t, row, slot, k, warp_sums);
  }
  const double sum_in = warp_sum(dot<V>(grad_input, t.x_next));
  if (lane0) {
    warp_sums[kColSkip] = sum_skip;
    warp_sums[kColOut] = sum_out;
    warp_sums[kColA] = sum_a;
    warp_sums[kColIn] = sum_in;
    warp_sums[kColGuidance] = sum_guidance;
    warp_sums[kColSlot] = 0.0;
    warp_sums[kColB] = sum_b0;
  }
  __syncthreads();
  double* partial = p.partial + (sample * p.tiles + tile) * width;
  for (int column = static_cast<int>(threadIdx.x); column < width; column += kThreads) {
    double sum = shared[column];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) sum += shared[w * width + column];
    partial[column] = sum;
  }
}

// out[o, c] = sum over i of in[o, i, c], by one warp per (o, c): lane l adds i = l, l + 32, ... in
// order, then the lanes' tree. The order depends on `count` alone.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    sum_middle_kernel(const double* in, Out* out, int64_t outer, int64_t count, int width) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= outer * width) return; // whole warps leave together
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t o = item / width;
  const int column = static_cast<int>(item - o * width);
  double sum = 0;
  for (int64_t i = lane; i < count; i += 32) sum += in[(o * count + i) * width + column];
  sum = warp_sum(sum);
  if (lane == 0) out[item] = static_cast<Out>(sum);
}

} // namespace dlms::cuda
