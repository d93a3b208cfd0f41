// Backward of the fused row: elementwise gradients and the sums for the row's coefficients.
//
// With g_x, g_m, g_i the gradients of x_next, m and the network input (ops/reference.py is the
// definition, and the elementwise results have its bits):
//
//   G      = g_x + c_in * g_i                     gradient of x_next, all paths
//   M      = g_m + b_0 * G                        gradient of m
//   dF     = c_out * M
//
//   grad_f = dF - guidance * dF                   without a second branch dF
//   grad_f_cond = guidance * dF
//   grad_x = a * G + c_skip * M
//   grad_ring[slot - k] = b_k * G                 k >= 1; grad_ring[slot] = 0
//   grad_row = sums of M x, M F, G x, g_i x_next, dF (f_cond - f), 0, G m, G m_{n-1}, ...
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
  const S* row;  // [batch or 1, kB + depth]
  F* grad_f;
  F* grad_f_cond; // or null
  S* grad_x;
  S* grad_ring;    // [depth, total]
  double* partial; // [batch, tiles, kB + depth]
  int64_t n;
  int64_t first; // sample of blockIdx.y 0
  int64_t tiles; // blockIdx.x: tiles of kThreads * V elements in a sample
  int64_t total;
  int64_t row_stride;
  int depth;
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

// Where one thread's elements lie. count is 0 for threads past the sample's end: their values are
// zero, so they add nothing, and they stay for the shuffles. kWhole: every pack is full and
// aligned.
template <bool kWhole, int V>
struct Place {
  int64_t at;
  int count;

  template <class T>
  __device__ __forceinline__ Pack<T, V> read(const T* p, bool wanted = true) const {
    if constexpr (kWhole) {
      return load_if<T, V>(p + at, wanted && count > 0, T(0.0f));
    } else {
      return load<T, V>(p + at, false, wanted ? count : 0);
    }
  }

  template <class T>
  __device__ __forceinline__ void write(T* p, const Pack<T, V>& v) const {
    if constexpr (kWhole) {
      if (count > 0) store<T, V>(p + at, v, true, V);
    } else {
      store<T, V>(p + at, v, false, count);
    }
  }
};

// One earlier slot: x_next += b m_{n-k}, its gradient, and the warp's sum of G m_{n-k}. The
// gradient to a zero weight reads its slot too, or learning could never leave zero; what is not
// finite in a slot of weight zero (never written, perhaps) counts as zero.
template <bool kWhole, int V, class S>
__device__ __forceinline__ void term(const Place<kWhole, V>& place, S b, Pack<S, V> past,
    const Pack<S, V>& grad_next, Pack<S, V>& x_next, S* grad_slot, double* sum) {
  Pack<S, V> grad;
#pragma unroll
  for (int j = 0; j < V; ++j) { // selections, no branches: the terms of several slots mix
    past.at[j] = b != S(0) || isfinite(past.at[j]) ? past.at[j] : S(0);
    const S sum_so_far = add(x_next.at[j], mul(b, past.at[j]));
    x_next.at[j] = b != S(0) ? sum_so_far : x_next.at[j];
    grad.at[j] = mul(b, grad_next.at[j]);
  }
  place.write(grad_slot, grad);
  const double total = warp_sum(dot<V>(grad_next, past));
  if (threadIdx.x % 32 == 0) *sum = total;
}

// One block: one tile of one sample. kDepth: the ring's depth when it is known at compile time,
// with all loads before the first use of any; else 0, kHistoryGroup slots at a time.
template <class S, class F, int kDepth, bool kWhole>
// Two blocks a multiprocessor at least, so up to 128 registers: without the 2, ptxas aims at 64 for
// float32 on sm_80 and spills.
__global__ void __launch_bounds__(kThreads, 2) fused_row_backward_kernel(const Backward<S, F> p) {
  extern __shared__ double shared[]; // [kWarps, width]
  constexpr int V = kLanes<F>;
  const int depth = kDepth > 0 ? kDepth : p.depth;
  const int width = kB + depth;
  double* warp_sums = shared + threadIdx.x / 32 * width;
  const bool lane0 = threadIdx.x % 32 == 0;
  const int64_t sample = p.first + blockIdx.y;
  const int64_t tile = blockIdx.x;
  const int64_t first = (tile * kThreads + threadIdx.x) * V;
  const int64_t left = p.n - first;
  Place<kWhole, V> place;
  place.count = left >= V ? V : (left > 0 ? static_cast<int>(left) : 0);
  place.at = place.count > 0 ? sample * p.n + first : 0;
  const S* row = p.row + sample * p.row_stride;

  constexpr int kKnown = kDepth > 0 ? kDepth : 1;
  S c[kB + kKnown];
#pragma unroll
  for (int column = 0; column < kB + kKnown; ++column) c[column] = load_number(row + column);
  const Pack<S, V> x = place.read(p.x);
  const Pack<F, V> f = place.read(p.f);
  const Pack<S, V> g_x = place.read(p.grad_x_next);
  const Pack<S, V> g_m = place.read(p.grad_m);
  const Pack<F, V> g_i = place.read(p.grad_input);
  const bool guided = p.f_cond != nullptr;
  const Pack<F, V> f_cond = place.read(p.f_cond, guided);
  const int slot = ring_slot(c[kSlot], depth);
  [[maybe_unused]] Pack<S, V> past[kKnown];
#pragma unroll
  for (int k = 1; k < kKnown; ++k) {
    past[k] = place.read(p.ring + slot_back(slot, k, depth) * p.total);
  }

  const S b0 = c[kB];
  const Pack<S, V> uncond = widen<S>(f), cond = widen<S>(f_cond), grad_input = widen<S>(g_i);
  Pack<S, V> mixed, m, grad_m, branch, grad_mixed, grad_x, grad_next, x_next;
  Pack<F, V> grad_f, grad_f_cond;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    branch.at[j] = sub(cond.at[j], uncond.at[j]);
    mixed.at[j] = guided ? add(uncond.at[j], mul(c[kGuidance], branch.at[j])) : uncond.at[j];
    m.at[j] = add(mul(c[kCSkip], x.at[j]), mul(c[kCOut], mixed.at[j]));
    x_next.at[j] = mul(c[kA], x.at[j]);
    if (b0 != S(0)) x_next.at[j] = add(x_next.at[j], mul(b0, m.at[j]));
    grad_next.at[j] = add(g_x.at[j], mul(c[kCIn], grad_input.at[j]));
    grad_m.at[j] = add(g_m.at[j], mul(b0, grad_next.at[j]));
    grad_mixed.at[j] = mul(c[kCOut], grad_m.at[j]);
    grad_x.at[j] = add(mul(c[kA], grad_next.at[j]), mul(c[kCSkip], grad_m.at[j]));
    const S scaled = mul(c[kGuidance], grad_mixed.at[j]);
    grad_f.at[j] = From<F>::state(guided ? sub(grad_mixed.at[j], scaled) : grad_mixed.at[j]);
    grad_f_cond.at[j] = From<F>::state(scaled);
  }
  place.write(p.grad_x, grad_x);
  place.write(p.grad_f, grad_f);
  if (guided) place.write(p.grad_f_cond, grad_f_cond);
  place.write(p.grad_ring + slot * p.total, Pack<S, V>{});

  const double sum_skip = warp_sum(dot<V>(grad_m, x));
  const double sum_out = warp_sum(dot<V>(grad_m, mixed));
  const double sum_a = warp_sum(dot<V>(grad_next, x));
  const double sum_guidance = guided ? warp_sum(dot<V>(grad_mixed, branch)) : 0.0;
  const double sum_b0 = warp_sum(dot<V>(grad_next, m));
  if constexpr (kDepth > 0) {
#pragma unroll
    for (int k = 1; k < kDepth; ++k) {
      term(place, c[kB + k], past[k], grad_next, x_next,
          p.grad_ring + slot_back(slot, k, depth) * p.total, warp_sums + kB + k);
    }
  } else {
    for (int k0 = 1; k0 < depth; k0 += kHistoryGroup) {
      Pack<S, V> group[kHistoryGroup];
#pragma unroll
      for (int g = 0; g < kHistoryGroup; ++g) {
        if (k0 + g >= depth) break;
        group[g] = place.read(p.ring + slot_back(slot, k0 + g, depth) * p.total);
      }
#pragma unroll
      for (int g = 0; g < kHistoryGroup; ++g) {
        const int k = k0 + g;
        if (k >= depth) break;
        term(place, row[kB + k], group[g], grad_next, x_next,
            p.grad_ring + slot_back(slot, k, depth) * p.total, warp_sums + kB + k);
      }
    }
  }
  const double sum_in = warp_sum(dot<V>(grad_input, x_next));
  if (lane0) {
    warp_sums[kCSkip] = sum_skip;
    warp_sums[kCOut] = sum_out;
    warp_sums[kA] = sum_a;
    warp_sums[kCIn] = sum_in;
    warp_sums[kGuidance] = sum_guidance;
    warp_sums[kSlot] = 0.0;
    warp_sums[kB] = sum_b0;
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
