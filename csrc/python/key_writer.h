// Live Python objects written out as bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "key_bytes.h"
#include "key_kinds.h"
#include "key_recipe.h"

namespace dlms {

constexpr Py_ssize_t kLongest = 512; // entries of a container that are looked at

// What comes next in a key.
enum Tag : char {
  kNone = 1,
  kBool,
  kInt,
  kFloat,
  kText,
  kBytes,
  kSequence,
  kMapping,
  kTensor,
  kModule,
  kFunction,
  kObject,
  kSeen,
  kLong, // a container too long to look at
  kDeep,
  kPlain, // a number or text among the moving parts
  kItems,
};

// What it is given goes to two streams: `settled` has what can only change together with a dict or
// an address that a Recipe checks, `moving` the rest: where tensors lie, numbers in lists and
// closures.
class Writer : public MovingParts {
 public:
  explicit Writer(std::pair<int, int> device) : device_(device) {}

  // where: the place in a list, a closure or a function that holds the object, which may hold
  // another one tomorrow; null if a dict, a tuple or the caller does.
  void value(PyObject* object, int depth, PyObject* const* where = nullptr);
  void root(PyObject* object, bool first);      // one that the caller holds; first: the network
  void input(PyObject* name, PyObject* tensor); // shape, dtype and device; the values are copied in
  void with_tensor_attributes(bool count) { tensor_attributes_ = count; }
  void record(Recipe* recipe) { recipe_ = recipe; } // null: no more

  bool place(PyObject* tensor, bool parameter) override;
  bool plain(PyObject* item) override;

  Bytes settled{0}, moving{1};
  std::string stray; // the network's first parameter that is not on the run's device

 private:
  template <class T>
  void raw_number(const T& number) {
    out_->put(number);
  }
  void tag(char tag) { out_->put(tag); }
  void pointer(const void* pointer) { raw_number(pointer); }
  void impossible() {
    if (recipe_ != nullptr) recipe_->impossible();
  }
  bool scalar(PyObject* object);
  bool number_or_text(PyObject* object);
  void text(PyObject* object);
  void integer(PyObject* object);
  void sequence(PyObject* object, int depth, bool held);
  void mapping(PyObject* object, int depth);
  std::pair<int, int> tensor(PyObject* object, bool parameter);
  void function(PyObject* object, int depth);
  void method(PyObject* object, int depth);
  void object(PyObject* object, Kind kind, int depth);
  void members(PyObject* object, int depth);
  void items(PyObject* object, int depth);
  void buffer(PyObject* object);
  void module(PyObject* object);
  void attribute(PyObject* name, PyObject* object);
  template <class Each>
  void entries(PyObject* dict, Each each); // of a module: their number, then each(name, item)
  void tensors(PyObject* dict, bool parameters);
  void children(PyObject* dict);
  void note_stray(PyObject* name);

  Bytes* out_ = &settled;
  Recipe* recipe_ = nullptr;
  Seen seen_;
  std::vector<PyObject*> path_; // names of the modules that are being looked at
  std::pair<int, int> device_;
  bool tensor_attributes_ = true;
  bool first_ = true;
};

} // namespace dlms
