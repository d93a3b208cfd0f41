// The arithmetic of the fused row. Included by isa.cpp with DLMS_ISA naming the instruction set
// that the compiler was given. Only built-in types and the names of namespace dlms::DLMS_ISA are
// used: an inline function of a std header compiled here for AVX-512 could be the copy that the
// linker keeps.
#pragma once

#include "fused_row.h"
#include "half.h"

namespace dlms::DLMS_ISA {

// Elements of a tile: its scratch arrays stay in the first-level cache.
constexpr int64_t kTile = 512;

// Numbers of one row, and pointers to the past slots it reads: those with a weight that is not
// zero.
template <class S>
struct Weights {
  S c_skip, c_out, a, c_in, guidance, b0;
  int past = 0;
  // Only the first `past` are set, and the three that the specialised loops load.
  S b[kMaxDepth];
  const S* slot[kMaxDepth];

  Weights() {
    for (int k = 0; k < 3; ++k) {
      b[k] = S(0);
      slot[k] = nullptr;
    }
  }
  Weights(const Weights& other) : Weights() {
    c_skip = other.c_skip;
    c_out = other.c_out;
    a = other.a;
    c_in = other.c_in;
    guidance = other.guidance;
    b0 = other.b0;
    past = other.past;
    for (int k = 0; k < past; ++k) {
      b[k] = other.b[k];
      slot[k] = other.slot[k];
    }
  }
  Weights& operator=(const Weights&) = delete;
};

template <class S, class N>
struct Streams {
  const N* f;
  const N* f_cond;
  const S* x;
  S* x_next;
  S* m;     // null: not stored
  N* input; // null: not stored
};

// The loop of every specialised depth. x_next may be x and input may be f, element for element, so
// there is no dependence between iterations (ivdep), though the pointers are not `restrict`.
template <class S, class N, bool kGuided, int kPast, bool kStoreM, bool kStoreInput>
void segment(const Weights<S>& w, const Streams<S, N>& s, int64_t n) {
  const S c_skip = w.c_skip, c_out = w.c_out, a = w.a, c_in = w.c_in, guidance = w.guidance;
  const S b0 = w.b0, b1 = w.b[0], b2 = w.b[1], b3 = w.b[2];
  const S *h1 = w.slot[0], *h2 = w.slot[1], *h3 = w.slot[2];
  const N* f = s.f;
  [[maybe_unused]] const N* f_cond = s.f_cond;
  const S* x = s.x;
  S* x_next = s.x_next;
  [[maybe_unused]] S* m_out = s.m;
  [[maybe_unused]] N* input = s.input;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    S out = widen<S>(f[i]);
    if constexpr (kGuided) out = out + guidance * (widen<S>(f_cond[i]) - out);
    const S m = c_skip * x[i] + c_out * out;
    S next = a * x[i] + b0 * m;
    if constexpr (kPast > 0) next = next + b1 * h1[i];
    if constexpr (kPast > 1) next = next + b2 * h2[i];
    if constexpr (kPast > 2) next = next + b3 * h3[i];
    if constexpr (kStoreM) m_out[i] = m;
    x_next[i] = next;
    if constexpr (kStoreInput) input[i] = narrow<N>(c_in * next);
  }
}

// Any depth, and rows that skip their own output (b0 == 0).
template <class S, class N, bool kGuided>
void segment_any(const Weights<S>& w, const Streams<S, N>& s, int64_t n) {
  S next[kTile], m[kTile];
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t size = n - at < kTile ? n - at : kTile;
    for (int64_t i = 0; i < size; ++i) {
      S out = widen<S>(s.f[at + i]);
      if constexpr (kGuided) out = out + w.guidance * (widen<S>(s.f_cond[at + i]) - out);
      m[i] = w.c_skip * s.x[at + i] + w.c_out * out;
      next[i] = w.a * s.x[at + i];
    }
    if (w.b0 != S(0))
      for (int64_t i = 0; i < size; ++i) next[i] = next[i] + w.b0 * m[i];
    for (int k = 0; k < w.past; ++k) {
      const S b = w.b[k];
      const S* past = w.slot[k] + at;
      for (int64_t i = 0; i < size; ++i) next[i] = next[i] + b * past[i];
    }
    for (int64_t i = 0; i < size; ++i) s.x_next[at + i] = next[i];
    if (s.m != nullptr)
      for (int64_t i = 0; i < size; ++i) s.m[at + i] = m[i];
    if (s.input != nullptr)
      for (int64_t i = 0; i < size; ++i) s.input[at + i] = narrow<N>(w.c_in * next[i]);
  }
}

template <class S, class N, bool kGuided, int kPast>
void segment_of_stores(const Weights<S>& w, const Streams<S, N>& s, int64_t n) {
  if (s.input == nullptr && s.m == nullptr)
    return segment<S, N, kGuided, kPast, false, false>(w, s, n);
  if (s.input == nullptr) return segment<S, N, kGuided, kPast, true, false>(w, s, n);
  if (s.m == nullptr) return segment<S, N, kGuided, kPast, false, true>(w, s, n);
  segment<S, N, kGuided, kPast, true, true>(w, s, n);
}

template <class S, class N, bool kGuided>
void segment_of_depth(const Weights<S>& w, const Streams<S, N>& s, int64_t n) {
  if (w.b0 == S(0) || w.past > 3) return segment_any<S, N, kGuided>(w, s, n);
  switch (w.past) {
    case 0: return segment_of_stores<S, N, kGuided, 0>(w, s, n);
    case 1: return segment_of_stores<S, N, kGuided, 1>(w, s, n);
    case 2: return segment_of_stores<S, N, kGuided, 2>(w, s, n);
    default: return segment_of_stores<S, N, kGuided, 3>(w, s, n);
  }
}

template <class S, class N>
void run_segment(const Weights<S>& w, const Streams<S, N>& s, int64_t n) {
  if (s.f_cond != nullptr) return segment_of_depth<S, N, true>(w, s, n);
  segment_of_depth<S, N, false>(w, s, n);
}

// float16 has no conversion that the compiler vectorises: convert a tile, run in float32, convert
// back.
template <>
void run_segment<float, Half>(const Weights<float>& all, const Streams<float, Half>& s, int64_t n) {
  float f[kTile], f_cond[kTile], input[kTile];
  Weights<float> w = all;
  for (int64_t at = 0; at < n; at += kTile) {
    const int64_t size = n - at < kTile ? n - at : kTile;
    widen_half(s.f + at, f, size);
    if (s.f_cond != nullptr) widen_half(s.f_cond + at, f_cond, size);
    Streams<float, float> tile;
    tile.f = f;
    tile.f_cond = s.f_cond != nullptr ? f_cond : nullptr;
    tile.x = s.x + at;
    tile.x_next = s.x_next + at;
    tile.m = s.m != nullptr ? s.m + at : nullptr;
    tile.input = s.input != nullptr ? input : nullptr;
    run_segment<float, float>(w, tile, size);
    if (s.input != nullptr) narrow_half(input, s.input + at, size);
    for (int k = 0; k < w.past; ++k) w.slot[k] += size;
  }
}

// The row of segment `index` read once, with pointers at element `offset` of the flattened batch.
template <class S>
Weights<S> read_row(const RowArgs& args, int64_t index, int64_t offset, int64_t* slot_out) {
  const S* row = static_cast<const S*>(args.row) + index * (kB + args.depth);
  const S* ring = static_cast<const S*>(args.ring);
  Weights<S> w;
  w.c_skip = row[kCSkip];
  w.c_out = row[kCOut];
  w.a = row[kA];
  w.c_in = row[kCIn];
  w.guidance = row[kGuidance];
  w.b0 = row[kB];
  const int64_t slot = static_cast<int64_t>(row[kSlot]);
  for (int64_t k = 1; k < args.depth; ++k) {
    if (row[kB + k] == S(0)) continue; // a zero weight: the slot may hold anything
    w.b[w.past] = row[kB + k];
    w.slot[w.past++] =
        ring + (slot - k + args.depth) % args.depth * args.batch * args.inner + offset;
  }
  *slot_out = slot;
  return w;
}

template <class S, class N>
void forward_typed(const RowArgs& args, int64_t begin, int64_t end) {
  const int64_t size = segment_size(args), stride = args.batch * args.inner;
  while (begin < end) {
    const int64_t index = begin / size;
    const int64_t stop = (index + 1) * size < end ? (index + 1) * size : end;
    int64_t slot = 0;
    const Weights<S> w = read_row<S>(args, index, begin, &slot);
    // In place, m goes to its ring slot: the caller handed a ring that may be written.
    S* m = args.m != nullptr ? static_cast<S*>(args.m)
                             : static_cast<S*>(const_cast<void*>(args.ring)) + slot * stride;
    const N* f_cond = static_cast<const N*>(args.f_cond);
    Streams<S, N> s;
    s.f = static_cast<const N*>(args.f) + begin;
    s.f_cond = f_cond != nullptr ? f_cond + begin : nullptr;
    s.x = static_cast<const S*>(args.x) + begin;
    s.x_next = static_cast<S*>(args.x_next) + begin;
    s.m = args.store_m ? m + begin : nullptr;
    s.input = args.store_input ? static_cast<N*>(args.network_input) + begin : nullptr;
    run_segment<S, N>(w, s, stop - begin);
    begin = stop;
  }
}

void forward(const RowArgs& args, int64_t begin, int64_t end) {
  if (args.state == Dtype::kFloat64) return forward_typed<double, double>(args, begin, end);
  switch (args.network) {
    case Dtype::kBFloat16: return forward_typed<float, BFloat16>(args, begin, end);
    case Dtype::kFloat16: return forward_typed<float, Half>(args, begin, end);
    default: return forward_typed<float, float>(args, begin, end);
  }
}

template <class S, class N>
void scale_typed(const RowArgs& args, const S* factor, int64_t begin, int64_t end) {
  const S* x = static_cast<const S*>(args.x);
  S* copy = static_cast<S*>(args.x_next);
  N* out = static_cast<N*>(args.network_input);
  const int64_t size = segment_size(args);
  while (begin < end) {
    const int64_t index = begin / size;
    const int64_t stop = (index + 1) * size < end ? (index + 1) * size : end;
    const S c = factor[index];
#pragma GCC ivdep
    for (int64_t i = begin; i < stop; ++i) {
      const S value = x[i];
      copy[i] = value;
      out[i] = narrow<N>(c * value);
    }
    begin = stop;
  }
}

void scale(const RowArgs& args, const void* factor, int64_t begin, int64_t end) {
  if (args.state == Dtype::kFloat64)
    return scale_typed<double, double>(args, static_cast<const double*>(factor), begin, end);
  const float* scalar = static_cast<const float*>(factor);
  switch (args.network) {
    case Dtype::kBFloat16: return scale_typed<float, BFloat16>(args, scalar, begin, end);
    case Dtype::kFloat16: return scale_typed<float, Half>(args, scalar, begin, end);
    default: return scale_typed<float, float>(args, scalar, begin, end);
  }
}

} // namespace dlms::DLMS_ISA
