// dlms::fused_row, fused_row_ and fused_row_backward for the CPU, on torch's stable ABI: one
// library for every torch >= 2.11 and every Python. The schemas are defined in
// python/dlms_engine/ops/schema.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fused_row.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "dlms::fused_row: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A macro, so that the message is put together only when it is needed: strings would cost more than
// the row. STD_TORCH_CHECK would put this file's path in front of what the user has to read.
#define DLMS_EXPECT(good, ...)      \
  do {                              \
    if (!(good)) fail(__VA_ARGS__); \
  } while (false)

std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d != 0 ? ", " : "") << t.size(d);
  out << "]";
  return out.str();
}

dlms::Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return dlms::Dtype::kFloat32;
    case ScalarType::Double: return dlms::Dtype::kFloat64;
    case ScalarType::BFloat16: return dlms::Dtype::kBFloat16;
    case ScalarType::Half: return dlms::Dtype::kFloat16;
    default: break;
  }
  fail(name, " has scalar type ", static_cast<int>(t.scalar_type()),
      ", expected float32, float64, bfloat16 or float16");
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

void expect_like(const Tensor& t, const char* name, const Tensor& other, const char* other_name) {
  DLMS_EXPECT(same_shape(t, other), name, " is ", shape_of(t), ", expected ", shape_of(other),
      " as ", other_name);
  DLMS_EXPECT(t.scalar_type() == other.scalar_type(), name, " and ", other_name,
      " have different dtypes (scalar types ", static_cast<int>(t.scalar_type()), " and ",
      static_cast<int>(other.scalar_type()), ")");
  DLMS_EXPECT(t.is_cpu(), name, " is not on the CPU");
}

// Checks everything that a RowArgs is formed from; contiguity is the caller's business.
dlms::RowArgs row_args(const Tensor& f, const std::optional<Tensor>& f_cond, const Tensor& x,
    const Tensor& ring, const Tensor& row) {
  dlms::RowArgs args;
  args.state = dtype_of(x, "x");
  args.network = dtype_of(f, "f");
  const bool wide = args.state == dlms::Dtype::kFloat64;
  DLMS_EXPECT(wide || args.state == dlms::Dtype::kFloat32, "x must be float32 or float64");
  DLMS_EXPECT(wide == (args.network == dlms::Dtype::kFloat64),
      "f must be float64 with a float64 state, and float32, bfloat16 or float16 with a float32 "
      "one");
  DLMS_EXPECT(x.dim() >= 1 && x.is_cpu(), "x is ", shape_of(x), ", expected [B, ...] on the CPU");
  DLMS_EXPECT(same_shape(f, x), "f is ", shape_of(f), ", expected ", shape_of(x), " as x");
  DLMS_EXPECT(
      f.is_cpu() && ring.is_cpu() && row.is_cpu(), "f, ring and row must be on the CPU as x");
  if (f_cond.has_value()) expect_like(*f_cond, "f_cond", f, "f");
  DLMS_EXPECT(ring.dim() == x.dim() + 1, "ring is ", shape_of(ring),
      ", expected [depth, ...] over ", shape_of(x));
  for (int64_t d = 0; d < x.dim(); ++d)
    DLMS_EXPECT(ring.size(d + 1) == x.size(d), "ring is ", shape_of(ring),
        ", expected [depth, ...] over ", shape_of(x));
  args.batch = x.size(0);
  args.inner = args.batch == 0 ? 0 : x.numel() / args.batch;
  args.depth = ring.size(0);
  DLMS_EXPECT(args.depth >= 1 && args.depth <= dlms::kMaxDepth, "depth is ", args.depth,
      ", expected 1 to ", dlms::kMaxDepth);
  const int64_t width = dlms::kB + args.depth;
  args.per_sample = row.dim() == 2;
  DLMS_EXPECT((row.dim() == 1 && row.size(0) == width) ||
                  (row.dim() == 2 && row.size(0) == args.batch && row.size(1) == width),
      "row is ", shape_of(row), ", expected [", width, "] or [", args.batch, ", ", width, "]");
  DLMS_EXPECT(ring.scalar_type() == x.scalar_type() && row.scalar_type() == x.scalar_type(),
      "ring and row must have the dtype of x");
  return args;
}

void set_inputs(dlms::RowArgs& args, const Tensor& f, const std::optional<Tensor>& f_cond,
    const Tensor& x, const Tensor& ring, const Tensor& row) {
  args.f = f.const_data_ptr();
  args.f_cond = f_cond.has_value() ? f_cond->const_data_ptr() : nullptr;
  args.x = x.const_data_ptr();
  args.ring = ring.const_data_ptr();
  args.row = row.const_data_ptr();
  const int64_t bad = args.batch * args.inner == 0 ? -1 : dlms::first_bad_slot(args);
  DLMS_EXPECT(bad < 0, "the slot column of row ", bad, " is not one of 0 .. ", args.depth - 1);
}

void run(const dlms::RowArgs& args) {
  const int64_t total = args.batch * args.inner;
  const auto& kernels = dlms::kernels();
  if (total <= dlms::kGrain) return kernels.forward(args, 0, total);
  const int64_t blocks = (total + dlms::kBlock - 1) / dlms::kBlock;
  torch::stable::parallel_for(
      0, blocks, dlms::kGrain / dlms::kBlock, [&](int64_t begin, int64_t end) {
        const int64_t stop = end * dlms::kBlock;
        kernels.forward(args, begin * dlms::kBlock, stop < total ? stop : total);
      });
}

Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

std::optional<Tensor> packed(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(packed(*t)) : std::nullopt;
}

// f, f_cond, x: [B, ...]; ring: [depth, B, ...]; row: [6 + depth] or [B, 6 + depth]
// -> x_next, m, network_input: [B, ...]. Copies inputs that are not contiguous.
std::tuple<Tensor, Tensor, Tensor> fused_row(
    Tensor f, std::optional<Tensor> f_cond, Tensor x, Tensor ring, Tensor row) {
  dlms::RowArgs args = row_args(f, f_cond, x, ring, row);
  f = packed(f);
  f_cond = packed(f_cond);
  x = packed(x);
  ring = packed(ring);
  row = packed(row);
  set_inputs(args, f, f_cond, x, ring, row);
  Tensor x_next = torch::stable::new_empty(x, x.sizes());
  Tensor m = torch::stable::new_empty(x, x.sizes());
  Tensor network_input = torch::stable::new_empty(f, f.sizes());
  args.x_next = x_next.mutable_data_ptr();
  args.m = m.mutable_data_ptr();
  args.network_input = network_input.mutable_data_ptr();
  run(args);
  return {x_next, m, network_input};
}

// As fused_row; x, one ring slot and network_input are overwritten and must be contiguous.
void fused_row_(Tensor f, std::optional<Tensor> f_cond, Tensor x, Tensor ring, Tensor row,
    Tensor network_input) {
  dlms::RowArgs args = row_args(f, f_cond, x, ring, row);
  expect_like(network_input, "network_input", f, "f");
  DLMS_EXPECT(x.is_contiguous(), "x is written in place and must be contiguous");
  DLMS_EXPECT(ring.is_contiguous(), "ring is written in place and must be contiguous");
  DLMS_EXPECT(network_input.is_contiguous(), "network_input is written and must be contiguous");
  f = packed(f);
  f_cond = packed(f_cond);
  row = packed(row);
  set_inputs(args, f, f_cond, x, ring, row);
  args.x_next = x.mutable_data_ptr();
  args.ring = ring.mutable_data_ptr();
  args.network_input = network_input.mutable_data_ptr();
  run(args);
}

// Sums the chunks' rows of doubles, in order, into grad_row.
template <class S>
void finish(const dlms::RowArgs& args, const double* partial, S* grad_row) {
  const int64_t width = dlms::kB + args.depth, per_segment = dlms::chunks(args);
  for (int64_t index = 0; index < dlms::segments(args); ++index) {
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < per_segment; ++chunk)
        sum += partial[(index * per_segment + chunk) * width + j];
      grad_row[index * width + j] = static_cast<S>(sum);
    }
  }
}

// grad_x_next, grad_m, grad_input: [B, ...] -> gradients of f, f_cond (empty without one), x, ring,
// row.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_row_backward(Tensor grad_x_next,
    Tensor grad_m, Tensor grad_input, Tensor f, std::optional<Tensor> f_cond, Tensor x, Tensor ring,
    Tensor row) {
  dlms::BackwardArgs args;
  args.row = row_args(f, f_cond, x, ring, row);
  expect_like(grad_x_next, "grad_x_next", x, "x");
  expect_like(grad_m, "grad_m", x, "x");
  expect_like(grad_input, "grad_input", f, "f");
  f = packed(f);
  f_cond = packed(f_cond);
  x = packed(x);
  ring = packed(ring);
  row = packed(row);
  grad_x_next = packed(grad_x_next);
  grad_m = packed(grad_m);
  grad_input = packed(grad_input);
  set_inputs(args.row, f, f_cond, x, ring, row);

  const int64_t none = 0;
  Tensor grad_f = torch::stable::new_empty(f, f.sizes());
  Tensor grad_f_cond = f_cond.has_value() ? torch::stable::new_empty(f, f.sizes())
                                          : torch::stable::new_empty(f,
                                                torch::headeronly::IntHeaderOnlyArrayRef(&none, 1));
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor grad_ring = torch::stable::new_zeros(ring, ring.sizes());
  Tensor grad_row = torch::stable::new_zeros(row, row.sizes());
  args.grad_x_next = grad_x_next.const_data_ptr();
  args.grad_m = grad_m.const_data_ptr();
  args.grad_input = grad_input.const_data_ptr();
  args.grad_f = grad_f.mutable_data_ptr();
  args.grad_f_cond = f_cond.has_value() ? grad_f_cond.mutable_data_ptr() : nullptr;
  args.grad_x = grad_x.mutable_data_ptr();
  args.grad_ring = grad_ring.mutable_data_ptr();

  const int64_t total_chunks = dlms::segments(args.row) * dlms::chunks(args.row);
  std::vector<double> partial(static_cast<size_t>(total_chunks * (dlms::kB + args.row.depth)));
  args.partial = partial.data();
  const auto& kernels = dlms::kernels();
  torch::stable::parallel_for(0, total_chunks, dlms::kGrain / 4 / dlms::kChunk,
      [&](int64_t begin, int64_t end) { kernels.backward(args, begin, end); });
  if (args.row.state == dlms::Dtype::kFloat64) {
    finish(args.row, args.partial, static_cast<double*>(grad_row.mutable_data_ptr()));
  } else {
    finish(args.row, args.partial, static_cast<float*>(grad_row.mutable_data_ptr()));
  }
  return {grad_f, grad_f_cond, grad_x, grad_ring, grad_row};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(dlms, CPU, m) {
  m.impl("fused_row", TORCH_BOX(&fused_row));
  m.impl("fused_row_", TORCH_BOX(&fused_row_));
  m.impl("_fused_row_", TORCH_BOX(&fused_row_)); // the same without autograd's book-keeping
  m.impl("fused_row_backward", TORCH_BOX(&fused_row_backward));
}
