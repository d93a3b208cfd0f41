// dlms::linear_rows for the CPU: a small linear layer whose sums do not depend on the batch, which
// BLAS does not promise. The schema and the meaning are in python/dlms_engine/ops/linear.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void expect(bool good, const char* message) {
  if (!good) throw std::runtime_error(message);
}

Tensor packed(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// Products in the order of the inputs, then the upper half onto the lower until one is left.
template <class S>
S halving_sum(const S* x, const S* weight, S* products, int64_t count) {
  for (int64_t k = 0; k < count; ++k) products[k] = x[k] * weight[k];
  while (count > 1) {
    const int64_t half = (count + 1) / 2;
    for (int64_t k = 0; k < count - half; ++k) products[k] += products[half + k];
    count = half;
  }
  return products[0];
}

template <class S>
void fill(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor& out) {
  const int64_t batch = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  const S* from = static_cast<const S*>(x.const_data_ptr());
  const S* rows = static_cast<const S*>(weight.const_data_ptr());
  const S* shift = bias.has_value() ? static_cast<const S*>(bias->const_data_ptr()) : nullptr;
  S* to = static_cast<S*>(out.mutable_data_ptr());
  std::vector<S> products(static_cast<size_t>(inputs));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t o = 0; o < outputs; ++o) {
      const S sum = halving_sum(from + b * inputs, rows + o * inputs, products.data(), inputs);
      to[b * outputs + o] = shift == nullptr ? sum : sum + shift[o];
    }
  }
}

// x: [B, in]; weight: [out, in]; bias: [out] or none -> [B, out]; float32 or float64.
Tensor linear_rows(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const ScalarType dtype = x.scalar_type();
  expect(dtype == ScalarType::Float || dtype == ScalarType::Double,
      "dlms::linear_rows: x must be float32 or float64");
  expect(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1) && x.size(1) > 0,
      "dlms::linear_rows: expected x [B, in] and weight [out, in] with in > 0");
  expect(weight.scalar_type() == dtype && x.is_cpu() && weight.is_cpu(),
      "dlms::linear_rows: weight must have the dtype of x and lie on the CPU as x");
  if (bias.has_value())
    expect(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == dtype &&
               bias->is_cpu(),
        "dlms::linear_rows: bias must be [out], in the dtype of x and on the CPU");
  x = packed(x);
  weight = packed(weight);
  if (bias.has_value()) bias = packed(*bias);
  const int64_t shape[] = {x.size(0), weight.size(0)};
  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape, 2));
  if (dtype == ScalarType::Float) {
    fill<float>(x, weight, bias, out);
  } else {
    fill<double>(x, weight, bias, out);
  }
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(dlms, CPU, m) {
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}
