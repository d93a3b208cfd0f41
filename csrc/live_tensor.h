// Memory that C++ owns and Python sees as tensors.
//
// The loop works on raw pointers while Python code (the network, row functions, callbacks) holds
// tensors over the same memory. The memory therefore belongs to neither: it is freed when the loop
// and the last tensor over it are gone, and torch cannot resize it ("storage that is not
// resizable"). What Python can still do to such a tensor, point it elsewhere or transpose it in
// place, is noticed after the call that did it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "fused_row.h"

namespace dlms {

constexpr int64_t kPage = 4096;

constexpr int64_t page_up(int64_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

// Page-aligned and uninitialised. Throws std::bad_alloc.
std::shared_ptr<char> allocate_pages(int64_t bytes);

// A contiguous CPU tensor over part of such memory.
class LiveTensor {
 public:
  LiveTensor() = default;
  LiveTensor(std::shared_ptr<char> memory, int64_t offset, std::vector<int64_t> shape, Dtype dtype);

  void* data() const { return memory_.get() + offset_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  // The tensor, as it was made: one that has been changed in place meanwhile is replaced.
  const pybind11::object& tensor();
  // ValueError, saying that `who` changed `what` in place, unless the tensor is as it was made;
  // the tensor is replaced, so that the next run does not meet it.
  void require_unchanged(const char* who, const char* what);

 private:
  bool changed() const;
  void make_tensor();

  std::shared_ptr<char> memory_;
  int64_t offset_ = 0;
  std::vector<int64_t> shape_;
  Dtype dtype_ = Dtype::kFloat32;
  pybind11::object tensor_;
};

} // namespace dlms
