// Forward of the fused row: one pass over memory between two network evaluations.
//
//   F      = f + guidance * (f_cond - f)          (two branches; else F = f)
//   m      = c_skip * x + c_out * F               -> ring slot `slot`, or a new tensor
//   x_next = a * x + sum_k b_k * m_{n-k}          -> over x, or a new tensor
//   input  = c_in * x_next                        -> in the network's dtype
//
// Bytes per element (fp32 state, network dtype of w bytes, h slots with a nonzero weight besides
// m_n): read 4 + w (+ w when guided) + 4 h, write 8 + w.

#pragma once

#include "row_math.cuh"

namespace dlms::cuda {

template <class S, class F>
struct Forward {
  const F* f;      // [samples, n]
  const F* f_cond; // the same, or null
  const S* x;      // [samples, n]
  const S* ring;   // [depth, total]
  const S* row;    // [samples or 1, kColB + depth]
  S* x_next;       // may be x itself: every thread reads its elements before it writes them
  S* m;            // a new tensor, or the ring itself when m_to_ring
  F* input;
  int64_t samples; // groups of elements that share a row: 1 for a static row
  int64_t n;       // elements of a group
  int64_t packs;   // ceil(n / V)
  int64_t total;   // elements of a ring slot
  int64_t row_stride;
  int depth;
  bool m_to_ring;
  bool aligned; // every pack may be moved in 16-byte accesses
};

// acc += b_k * m_{n-k} for k0 <= k < min(k0 + G, depth), in this order. All loads are issued before
// the first sum. A weight of exactly zero: the slot is not read.
template <int G, int V, class S>
__device__ __forceinline__ void add_history(Pack<S, V>& acc, const S* ring, int64_t total,
    const S* row, int slot, int k0, int depth, bool whole, int count) {
  S b[G];
  Pack<S, V> past[G];
#pragma unroll
  for (int g = 0; g < G; ++g) b[g] = k0 + g < depth ? row[kColB + k0 + g] : S(0);
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (b[g] != S(0)) {
      past[g] = load<S, V>(ring + slot_back(slot, k0 + g, depth) * total, whole, count);
    }
  }
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (b[g] != S(0)) {
#pragma unroll
      for (int j = 0; j < V; ++j) acc.at[j] = add(acc.at[j], mul(b[g], past[g].at[j]));
    }
  }
}

// One pack of V elements. kDepth: the ring's depth when it is known at compile time, else 0.
// kWhole: every pack is full and aligned.
template <bool kWhole, int kDepth, class S, class F>
__device__ __forceinline__ void fused_row_pack(const Forward<S, F>& p) {
  constexpr int V = kLanes<F>;
  constexpr bool whole = kWhole;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= p.samples * p.packs) return;
  int64_t sample = 0;
  int64_t pack = item;
  if (p.samples > 1) split(item, p.packs, sample, pack);
  const int64_t left = p.n - pack * V;
  const int count = kWhole || left >= V ? V : static_cast<int>(left);
  const int64_t at = sample * p.n + pack * V;
  const S* row = p.row + sample * p.row_stride;
  const int depth = kDepth > 0 ? kDepth : p.depth;

  const Pack<S, V> x = load<S, V>(p.x + at, whole, count);
  const Pack<F, V> f = load<F, V>(p.f + at, whole, count);
  const bool guided = p.f_cond != nullptr;
  Pack<F, V> f_cond = f;
  if (guided) f_cond = load<F, V>(p.f_cond + at, whole, count);

  const S c_skip = row[kColSkip];
  const S c_out = row[kColOut];
  const S a = row[kColA];
  const S c_in = row[kColIn];
  const S guidance = row[kColGuidance];
  const S b0 = row[kColB];
  const int slot = ring_slot(row, depth);

  Pack<S, V> m;
  Pack<S, V> acc;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    S mixed = to_state<S>(f.at[j]);
    if (guided) mixed = add(mixed, mul(guidance, sub(to_state<S>(f_cond.at[j]), mixed)));
    m.at[j] = add(mul(c_skip, x.at[j]), mul(c_out, mixed));
    acc.at[j] = mul(a, x.at[j]);
    if (b0 != S(0)) acc.at[j] = add(acc.at[j], mul(b0, m.at[j]));
  }
  if constexpr (kDepth > 1) {
    add_history<kDepth - 1, V>(acc, p.ring + at, p.total, row, slot, 1, depth, whole, count);
  } else if constexpr (kDepth == 0) {
    for (int k = 1; k < depth; k += kGroup) {
      add_history<kGroup, V>(acc, p.ring + at, p.total, row, slot, k, depth, whole, count);
    }
  }

  Pack<F, V> input;
#pragma unroll
  for (int j = 0; j < V; ++j) input.at[j] = From<F>::state(mul(c_in, acc.at[j]));
  store<S, V>(p.m + at + (p.m_to_ring ? slot * p.total : 0), m, whole, count);
  store<S, V>(p.x_next + at, acc, whole, count);
  store<F, V>(p.input + at, input, whole, count);
}

template <class S, class F, int kDepth>
__global__ void __launch_bounds__(kThreads) fused_row_kernel(const Forward<S, F> p) {
  if (p.aligned) {
    fused_row_pack<true, kDepth>(p);
  } else {
    fused_row_pack<false, kDepth>(p);
  }
}

} // namespace dlms::cuda
