// What kinds of objects a key tells apart.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace dlms {

// What kind of object a type makes; types are looked at once.
enum class Kind {
  kPlainObject,
  kOpaque,
  kByAddress,
  kModule,
  kTensor,
  kFunction,
  kMethod,
  kByText,
  kUnordered, // sets, queues: their items
  kBuffer     // numpy's arrays and numbers, bytearrays: their bytes
};

// Looked up by type; types are looked at once.
Kind kind_of(PyObject* object);

// What an object holds outside of its dict: __slots__, and the fields of objects made in C, such as
// a partial's function.
struct Member {
  Py_ssize_t offset;    // where in it a reference lies
  PyObject* descriptor; // of anything else; null for a reference
};
const std::vector<Member>& members_of(PyTypeObject* type);

// The attributes that every nn.Module has.
enum class Attribute { kOther, kParameters, kBuffers, kModules, kIgnored };
Attribute attribute_of(PyObject* name);

// Addresses met so far: open addressing, since a large network has thousands of modules.
class Seen {
 public:
  bool insert(const void* pointer) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    const bool fresh = place(pointer);
    count_ += fresh ? 1 : 0;
    return fresh;
  }

 private:
  bool place(const void* pointer) {
    const size_t mask = slots_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(pointer) >> 4) * 0x9E3779B97F4A7C15ull >> 20 & mask;
    while (slots_[at] != nullptr) {
      if (slots_[at] == pointer) return false;
      at = (at + 1) & mask;
    }
    slots_[at] = pointer;
    return true;
  }
  void grow() {
    std::vector<const void*> old(slots_.empty() ? 256 : slots_.size() * 4, nullptr);
    old.swap(slots_);
    for (const void* pointer : old)
      if (pointer != nullptr) place(pointer);
  }
  std::vector<const void*> slots_;
  size_t count_ = 0;
};

} // namespace dlms
