#include "live_tensor.h"

#include <cstdlib>
#include <new>
#include <string>
#include <utility>

#include "tensor_view.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace dlms {
namespace {

// Large states: 2 MiB pages, where the system gives them on request (measured: 10 % at 12 MiB).
// Advice only, so a refusal is not an error.
void advise_huge_pages(void* start, int64_t bytes) {
  constexpr int64_t kHugePage = int64_t(2) << 20;
#if defined(__linux__)
  if (bytes >= 2 * kHugePage) (void)madvise(start, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
  (void)start, (void)bytes, (void)kHugePage;
#endif
}

} // namespace

std::shared_ptr<char> allocate_pages(int64_t bytes) {
  const int64_t size = page_up(bytes > 0 ? bytes : 1);
  void* memory = std::aligned_alloc(kPage, static_cast<size_t>(size));
  if (memory == nullptr) throw std::bad_alloc();
  advise_huge_pages(memory, size);
  return {static_cast<char*>(memory), [](char* p) { std::free(p); }};
}

LiveTensor::LiveTensor(
    std::shared_ptr<char> memory, int64_t offset, std::vector<int64_t> shape, Dtype dtype)
    : memory_(std::move(memory)), offset_(offset), shape_(std::move(shape)), dtype_(dtype) {
  make_tensor();
}

void LiveTensor::make_tensor() {
  tensor_ = tensor_over(memory_, static_cast<char*>(data()), shape_, dtype_);
}

bool LiveTensor::changed() const {
  const TensorView view = view_of(tensor_, "live tensor");
  const bool empty = product(shape_) == 0; // has no address
  return (!empty && view.data != data()) || !view.known_dtype || view.dtype != dtype_ ||
         !view.on_cpu || !view.contiguous ||
         !view.has_shape(shape_.data(), static_cast<int>(shape_.size()));
}

const py::object& LiveTensor::tensor() {
  if (changed()) make_tensor();
  return tensor_;
}

void LiveTensor::require_unchanged(const char* who, const char* what) {
  if (!changed()) return;
  const std::string now = describe(tensor_);
  make_tensor();
  throw py::value_error(std::string(who) + " changed the shape or memory of " + what +
                        " in place, it is now " + now + ", expected " + dtype_name(dtype_) + " " +
                        shape_text(shape_.data(), static_cast<int>(shape_.size())) +
                        " where it was: work on a clone or a view, or write values only");
}

} // namespace dlms
