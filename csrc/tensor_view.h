// A Python torch.Tensor read as raw memory, through the DLPack exchange table that torch >= 2.10
// puts on its tensor type: a plain C struct of function pointers, so the module does not depend on
// torch's C++ ABI, and a tensor costs some 30 ns to look into instead of several attribute
// look-ups.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fused_row.h"

namespace dlms {

struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  bool known_dtype = false;
  bool on_cpu = false;
  bool contiguous = false;
  int ndim = 0;
  const int64_t* shape = nullptr; // valid while the tensor lives

  bool has_shape(const int64_t* expected, int n) const;
};

// Where the memory of a tensor is and how it lies there, any dtype and device.
struct TensorPlace {
  void* data = nullptr;
  uint64_t layout = 0;        // digest of sizes and strides
  uint32_t dtype = 0;         // DLPack's code, bits and lanes
  std::pair<int, int> device; // DLPack's type, and index
};

struct RawTensor : TensorPlace {
  int ndim = 0;
  const int64_t* shape = nullptr; // valid while the tensor lives
  size_t bytes = 0;
  bool contiguous = false;
};

// False, without an error set, for what is not a tensor with memory of its own (a subclass that
// wraps others).
bool place_of(pybind11::handle object, TensorPlace* out);
bool raw_tensor(pybind11::handle object, RawTensor* out);

// TypeError unless `object` is a torch.Tensor; BufferError for one that cannot be read as memory.
// `name` is what messages call it.
TensorView view_of(pybind11::handle object, const char* name);

// ValueError unless the storage of `object` still holds every byte of it: Python can shrink a
// storage under a tensor that keeps its shape. `view` is contiguous memory.
void require_storage(const TensorView& view, pybind11::handle object, const std::string& name);

// A contiguous CPU tensor over `data`, which `memory` keeps alive; torch cannot resize it.
pybind11::object tensor_over(
    std::shared_ptr<char> memory, char* data, const std::vector<int64_t>& shape, Dtype dtype);

// "float32 [2, 3] on cpu", from Python, for messages.
std::string describe(pybind11::handle object);

// ValueError, naming both, unless `view` is contiguous CPU memory of that shape and dtype.
void require(const TensorView& view, pybind11::handle object, const std::string& name,
    const int64_t* shape, int ndim, Dtype dtype);

Dtype dtype_from_python(pybind11::handle torch_dtype, const char* name);
const char* dtype_name(Dtype dtype);
int64_t product(const std::vector<int64_t>& shape);
// ValueError unless every size is at least 0 and all of it fits an address space.
int64_t checked_bytes(const std::vector<int64_t>& shape, Dtype dtype);
std::string shape_text(const int64_t* shape, int ndim);

} // namespace dlms
