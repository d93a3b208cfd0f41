#include "key_recipe.h"

namespace dlms {
namespace {

constexpr size_t kAhead = 12; // checks between fetching a line of memory and looking at it

uint64_t version_of(const void* dict) {
#if PY_VERSION_HEX >= 0x030D0000
  (void)dict;
  return 0;
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations" // since 3.12, where it still works
  return static_cast<const PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#endif
}

// Whether `object` still has its attributes in `dict`, at that version.
bool has_attributes(PyObject* object, const void* dict, uint64_t version) {
  PyObject* now = PyObject_GenericGetDict(object, nullptr);
  if (now == nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool same = now == dict && version_of(now) == version;
  Py_DECREF(now); // the object holds it
  return same;
}

} // namespace

void Recipe::holder(PyObject* object, PyObject* dict) {
  items_.push_back({Check::kHolder, object, Py_TYPE(object), dict, version_of(dict)});
}

void Recipe::type(PyObject* object) {
  items_.push_back({Check::kType, object, Py_TYPE(object)});
}

void Recipe::dict(PyObject* dict) {
  items_.push_back({Check::kDict, dict, Py_TYPE(dict), nullptr, version_of(dict)});
}

void Recipe::slot(PyObject* const* where) {
  items_.push_back({Check::kSlot, where, *where});
}

void Recipe::plain(PyObject* const* where) {
  items_.push_back({Check::kPlain, where});
}

void Recipe::list(PyObject* list) {
  tuple(list);
  // The array is another one after it has grown.
  const auto& items = reinterpret_cast<PyListObject*>(list)->ob_item;
  items_.push_back({Check::kSlot, &items, items});
}

void Recipe::tuple(PyObject* tuple) {
  items_.push_back({Check::kSize, tuple, Py_TYPE(tuple), nullptr,
      static_cast<uint64_t>(reinterpret_cast<PyVarObject*>(tuple)->ob_size)});
}

void Recipe::tensor(PyObject* tensor, bool parameter) {
  items_.push_back({parameter ? Check::kParameter : Check::kTensor, tensor});
}

bool Recipe::holds(const Item& item, MovingParts* parts) const {
  auto* object = static_cast<PyObject*>(const_cast<void*>(item.where));
  switch (item.check) {
    case Check::kHolder:
      return Py_TYPE(object) == item.expected &&
             has_attributes(object, item.attributes, item.number);
    case Check::kType: return Py_TYPE(object) == item.expected;
    case Check::kDict: return Py_TYPE(object) == item.expected && version_of(object) == item.number;
    case Check::kSlot: return *static_cast<const void* const*>(item.where) == item.expected;
    case Check::kPlain: {
      PyObject* now = *static_cast<PyObject* const*>(item.where);
      return now != nullptr && parts->plain(now);
    }
    case Check::kSize:
      return Py_TYPE(object) == item.expected &&
             static_cast<uint64_t>(reinterpret_cast<PyVarObject*>(object)->ob_size) == item.number;
    case Check::kTensor: return parts->place(object, false);
    case Check::kParameter: return parts->place(object, true);
  }
  return false;
}

bool Recipe::replay(MovingParts* parts) const {
  const size_t count = items_.size();
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count) { // a hint, also where the address is nothing any more
      __builtin_prefetch(items_[i + kAhead].where);
      __builtin_prefetch(items_[i + kAhead].attributes);
    }
    if (!holds(items_[i], parts)) return false;
  }
  return true;
}

} // namespace dlms
