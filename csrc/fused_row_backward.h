// Gradients of the fused row: elementwise ones like the forward pass, and for every number of the
// row a sum over the elements it served, in double and in a fixed order.
#pragma once

#include "fused_row_kernel.h"

namespace dlms::DLMS_ISA {

// Eight running sums, so that the order is fixed and the loop still vectorises.
template <class S>
double dot(const S* u, const S* v, int64_t n) {
  double lanes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int lane = 0; lane < 8; ++lane)
      lanes[lane] += static_cast<double>(u[i + lane]) * static_cast<double>(v[i + lane]);
  for (; i < n; ++i) lanes[0] += static_cast<double>(u[i]) * static_cast<double>(v[i]);
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// A zero weight still learns from its slot; what is not finite there was never written and is zero.
template <class S>
void finite_or_zero(const S* in, S* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] - in[i] == S(0) ? in[i] : S(0);
}

template <class S>
struct Tile {
  S uncond[kTile], difference[kTile], output[kTile], m[kTile], x_next[kTile];
  S grad_input[kTile], grad_next[kTile], grad_m[kTile], grad_output[kTile], finite[kTile];
};

// One tile at element `at` of the flattened batch, with the row at `row`; adds to sums[6 + depth].
template <class S, class N>
void backward_tile(
    const BackwardArgs& args, const S* row, int64_t at, int64_t n, Tile<S>& t, double* sums) {
  const RowArgs& r = args.row;
  const int64_t stride = r.batch * r.inner;
  const S* x = static_cast<const S*>(r.x) + at;
  const N* f = static_cast<const N*>(r.f) + at;
  const bool guided = r.f_cond != nullptr;
  const S c_skip = row[kCSkip], c_out = row[kCOut], a = row[kA], c_in = row[kCIn];
  const S guidance = row[kGuidance], b0 = row[kB];
  const int64_t slot = static_cast<int64_t>(row[kSlot]);

  for (int64_t i = 0; i < n; ++i) t.output[i] = t.uncond[i] = widen<S>(f[i]);
  if (guided) {
    const N* f_cond = static_cast<const N*>(r.f_cond) + at;
    for (int64_t i = 0; i < n; ++i) {
      t.difference[i] = widen<S>(f_cond[i]) - t.uncond[i];
      t.output[i] = t.uncond[i] + guidance * t.difference[i];
    }
  }
  const S* grad_x_next = static_cast<const S*>(args.grad_x_next) + at;
  const S* grad_m = static_cast<const S*>(args.grad_m) + at;
  const N* grad_input = static_cast<const N*>(args.grad_input) + at;
  S* grad_x = static_cast<S*>(args.grad_x) + at;
  for (int64_t i = 0; i < n; ++i) {
    t.m[i] = c_skip * x[i] + c_out * t.output[i];
    t.x_next[i] = a * x[i];
    t.grad_input[i] = widen<S>(grad_input[i]);
    t.grad_next[i] = grad_x_next[i] + c_in * t.grad_input[i];
    t.grad_m[i] = grad_m[i] + b0 * t.grad_next[i];
    t.grad_output[i] = c_out * t.grad_m[i];
    grad_x[i] = a * t.grad_next[i] + c_skip * t.grad_m[i];
  }
  if (b0 != S(0))
    for (int64_t i = 0; i < n; ++i) t.x_next[i] = t.x_next[i] + b0 * t.m[i];
  sums[kB] += dot(t.grad_next, t.m, n);
  for (int64_t k = 1; k < r.depth; ++k) {
    const S b = row[kB + k];
    const int64_t offset = (slot - k + r.depth) % r.depth * stride + at;
    const S* past = static_cast<const S*>(r.ring) + offset;
    S* grad_past = static_cast<S*>(args.grad_ring) + offset;
    for (int64_t i = 0; i < n; ++i) grad_past[i] = b * t.grad_next[i];
    if (b != S(0)) {
      for (int64_t i = 0; i < n; ++i) t.x_next[i] = t.x_next[i] + b * past[i];
    } else {
      finite_or_zero(past, t.finite, n);
      past = t.finite;
    }
    sums[kB + k] += dot(t.grad_next, past, n);
  }
  sums[kCSkip] += dot(t.grad_m, x, n);
  sums[kCOut] += dot(t.grad_m, t.output, n);
  sums[kA] += dot(t.grad_next, x, n);
  sums[kCIn] += dot(t.grad_input, t.x_next, n);

  N* grad_f = static_cast<N*>(args.grad_f) + at;
  if (!guided) {
    for (int64_t i = 0; i < n; ++i) grad_f[i] = narrow<N>(t.grad_output[i]);
    return;
  }
  sums[kGuidance] += dot(t.grad_output, t.difference, n);
  N* grad_f_cond = static_cast<N*>(args.grad_f_cond) + at;
  for (int64_t i = 0; i < n; ++i) {
    const S scaled = guidance * t.grad_output[i];
    grad_f[i] = narrow<N>(t.grad_output[i] - scaled);
    grad_f_cond[i] = narrow<N>(scaled);
  }
}

template <class S, class N>
void backward_typed(const BackwardArgs& args, int64_t begin, int64_t end) {
  const RowArgs& r = args.row;
  const int64_t width = kB + r.depth, size = segment_size(r), per_segment = chunks(r);
  Tile<S> tile;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t index = chunk / per_segment, first = chunk % per_segment * kChunk;
    const int64_t last = first + kChunk < size ? first + kChunk : size;
    const S* row = static_cast<const S*>(r.row) + index * width;
    double* sums = args.partial + chunk * width;
    for (int64_t j = 0; j < width; ++j) sums[j] = 0;
    for (int64_t at = first; at < last; at += kTile) {
      const int64_t n = last - at < kTile ? last - at : kTile;
      backward_tile<S, N>(args, row, index * size + at, n, tile, sums);
    }
  }
}

void backward(const BackwardArgs& args, int64_t begin, int64_t end) {
  if (args.row.state == Dtype::kFloat64) return backward_typed<double, double>(args, begin, end);
  switch (args.row.network) {
    case Dtype::kBFloat16: return backward_typed<float, BFloat16>(args, begin, end);
    case Dtype::kFloat16: return backward_typed<float, Half>(args, begin, end);
    default: return backward_typed<float, float>(args, begin, end);
  }
}

} // namespace dlms::DLMS_ISA
