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

// Blocks a multiprocessor at least, which bounds the registers of a thread: 64 for 4, 80 for 3.
// Networks of two bytes a number have eight elements a thread.
template <class F>
constexpr int kBlocks = sizeof(F) == 2 ? 3 : 4;

template <class S, class F>
struct Forward {
  const F* f;      // [samples, n]
  const F* f_cond; // the same, or null
  const S* x;      // [samples, n]
  const S* ring;   // [depth, total]
  const S* row;    // [samples or 1, kB + depth]
  S* x_next;       // may be x itself: every thread reads its elements before it writes them
  S* m;            // a new tensor, or the ring itself when m_to_ring
  F* input;
  int64_t n;     // elements of a group that shares a row: all of them, or those of a sample
  int64_t packs; // ceil(n / V); blockIdx.x counts packs, blockIdx.y groups
  int64_t total; // elements of a ring slot
  int64_t row_stride;
  int depth;
  bool m_to_ring;

  // Groups from `count` on. A slot is found from its first element, so the ring moves like the
  // rest.
  void skip(int64_t count) {
    const int64_t elements = count * n;
    f += elements;
    if (f_cond != nullptr) f_cond += elements;
    x += elements;
    ring += elements;
    row += count * row_stride;
    x_next += elements;
    m += elements;
    input += elements;
  }
};

// A slot's element that lies `number` slots behind p. In bytes: a multiply-add and nothing after
// it.
template <class S>
__device__ __forceinline__ const S* slot_start(const S* p, unsigned number, uint64_t slot_bytes) {
  return reinterpret_cast<const S*>(reinterpret_cast<const char*>(p) + number * slot_bytes);
}

// Past model outputs of one pack: past[k - 1] = m_{n-k}, 1 <= k < kDepth, each its own loads.
//
// kEarly: every slot is loaded before the number of the row's slot has arrived, and the right ones
// are chosen afterwards. That saves one of two waits for memory and reads at least one slot that
// nothing needs: for states so small that waiting is all they do. Otherwise the slots whose weight
// is zero, and the one that m is about to fill, are not read.
template <bool kEarly, int kDepth, int V, class S>
struct Past {
  static constexpr int kSlots = kDepth - 1;
  Pack<S, V> at[kSlots];
  Pack<S, V> ring[kEarly ? kDepth : 1];

  __device__ __forceinline__ void load_early(const S* slots, int64_t total) {
    if constexpr (kEarly) {
#pragma unroll
      for (int s = 0; s < kDepth; ++s) ring[s] = load<S, V>(slots + s * total, true, V);
    }
  }

  // A weight of zero: its slot counts as -0 and the weight as +0, so that the sum adds -0, which
  // changes no number. (A branch around the sum would keep the assembler from mixing the terms.)
  __device__ __forceinline__ void load_late(
      const S* slots, uint64_t slot_bytes, S* weights, S slot) {
#pragma unroll
    for (int k = 1; k < kDepth; ++k) {
      const bool wanted = weights[k] != S(0);
      const unsigned from = ring_slot_back<kDepth>(slot, k);
      if constexpr (kEarly) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          S value = S(-0.0);
#pragma unroll
          for (int s = 0; s < kDepth; ++s) value = wanted && from == s ? ring[s].at[j] : value;
          at[k - 1].at[j] = value;
        }
      } else {
        at[k - 1] = load_if<S, V>(slot_start(slots, from, slot_bytes), wanted, S(-0.0));
      }
      if (!wanted) weights[k] = S(0);
    }
  }
};

template <class S, int V>
__device__ __forceinline__ void add_term(Pack<S, V>& acc, S weight, const Pack<S, V>& term) {
#pragma unroll
  for (int j = 0; j < V; ++j) acc.at[j] = add(acc.at[j], mul(weight, term.at[j]));
}

// m and the part of x_next without history. c: the row's first columns.
template <class S, int V>
__device__ __forceinline__ void first_terms(
    const S* c, const Pack<S, V>& x, const Pack<S, V>& mixed, Pack<S, V>& m, Pack<S, V>& acc) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    m.at[j] = add(mul(c[kCSkip], x.at[j]), mul(c[kCOut], mixed.at[j]));
    acc.at[j] = mul(c[kA], x.at[j]);
  }
  if (c[kB] != S(0)) add_term(acc, c[kB], m);
}

// f + guidance * (f_cond - f)
template <class S, int V>
__device__ __forceinline__ Pack<S, V> guide(
    const Pack<S, V>& f, const Pack<S, V>& f_cond, S guidance) {
  Pack<S, V> mixed;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    mixed.at[j] = add(f.at[j], mul(guidance, sub(f_cond.at[j], f.at[j])));
  }
  return mixed;
}

template <class S, class F, int V>
__device__ __forceinline__ void store_row(const Forward<S, F>& p, int64_t at, int64_t slot, S c_in,
    const Pack<S, V>& m, const Pack<S, V>& acc, bool whole, int count) {
  Pack<F, V> input;
#pragma unroll
  for (int j = 0; j < V; ++j) input.at[j] = From<F>::state(mul(c_in, acc.at[j]));
  store<S, V>(p.m + at + (p.m_to_ring ? slot * p.total : 0), m, whole, count);
  store<S, V>(p.x_next + at, acc, whole, count);
  store<F, V>(p.input + at, input, whole, count);
}

// Threads of every published solver up to iPNDM-4: a ring of 1 to 4 slots, every pack full and
// aligned. One pack of V elements a thread, all loads before the first use of any.
template <class S, class F, int kDepth, bool kEarly, bool kGuided>
__global__ void __launch_bounds__(kThreads, kBlocks<F>) fused_row_kernel(const Forward<S, F> p) {
  constexpr int V = kLanes<F>;
  const int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pack >= p.packs) return;
  const int64_t at = blockIdx.y * p.n + pack * V;
  const S* row = p.row + blockIdx.y * p.row_stride;

  S c[kB + kDepth];
#pragma unroll
  for (int column = 0; column < kB + kDepth; ++column) c[column] = load_number(row + column);
  const Pack<S, V> x = load<S, V>(p.x + at, true, V);
  const Pack<F, V> f = load<F, V>(p.f + at, true, V);
  [[maybe_unused]] Pack<F, V> f_cond;
  if constexpr (kGuided) f_cond = load<F, V>(p.f_cond + at, true, V);
  [[maybe_unused]] Past<kEarly, kDepth, V, S> past;
  if constexpr (kDepth > 1) past.load_early(p.ring + at, p.total);
  if constexpr (kDepth > 1) past.load_late(p.ring + at, p.total * sizeof(S), c + kB, c[kSlot]);

  Pack<S, V> m, acc, mixed = widen<S>(f);
  if constexpr (kGuided) mixed = guide(mixed, widen<S>(f_cond), c[kGuidance]);
  first_terms(c, x, mixed, m, acc);
#pragma unroll
  for (int k = 1; k < kDepth; ++k) add_term(acc, c[kB + k], past.at[k - 1]);
  const unsigned slot = ring_slot_back<kDepth>(c[kSlot], 0);
  store_row(p, at, slot, c[kCIn], m, acc, true, V);
}

// acc += b_k * m_{n-k} for k0 <= k < min(k0 + kGroup, depth), in this order, kGroup slots in
// flight. A weight of exactly zero: the slot is not read.
template <int V, class S>
__device__ __forceinline__ void add_history(Pack<S, V>& acc, const S* ring, int64_t total,
    const S* row, int slot, int k0, int depth, bool whole, int count) {
  S b[kGroup];
  Pack<S, V> past[kGroup];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) b[g] = k0 + g < depth ? row[kB + k0 + g] : S(0);
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (b[g] != S(0)) {
      past[g] = load<S, V>(ring + slot_back(slot, k0 + g, depth) * total, whole, count);
    }
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (b[g] != S(0)) add_term(acc, b[g], past[g]);
  }
}

// Any depth, any alignment (kWhole: every pack is full and aligned).
template <class S, class F, bool kWhole>
__global__ void __launch_bounds__(kThreads) fused_row_any_kernel(const Forward<S, F> p) {
  constexpr int V = kLanes<F>;
  const int64_t pack = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pack >= p.packs) return;
  const int64_t left = p.n - pack * V;
  const int count = kWhole || left >= V ? V : static_cast<int>(left);
  const int64_t at = blockIdx.y * p.n + pack * V;
  const S* row = p.row + blockIdx.y * p.row_stride;

  S c[kB + 1];
#pragma unroll
  for (int column = 0; column <= kB; ++column) c[column] = load_number(row + column);
  const Pack<S, V> x = load<S, V>(p.x + at, kWhole, count);
  const Pack<F, V> f = load<F, V>(p.f + at, kWhole, count);
  const bool guided = p.f_cond != nullptr;
  Pack<F, V> f_cond{};
  if (guided) f_cond = load<F, V>(p.f_cond + at, kWhole, count);
  const int slot = ring_slot(c[kSlot], p.depth);

  Pack<S, V> m, acc, mixed = widen<S>(f);
  if (guided) mixed = guide(mixed, widen<S>(f_cond), c[kGuidance]);
  first_terms(c, x, mixed, m, acc);
  for (int k = 1; k < p.depth; k += kGroup) {
    add_history<V>(acc, p.ring + at, p.total, row, slot, k, p.depth, kWhole, count);
  }
  store_row(p, at, slot, c[kCIn], m, acc, kWhole, count);
}

} // namespace dlms::cuda
