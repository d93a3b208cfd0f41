// What a key was read from, so that the next key of the same objects need not read them again.
//
// A CPython dict has a version that no other dict, living or dead, has had (PEP 509): while it is
// the same, so are the dict's keys and values, and these are alive. A recipe is the list of what
// has to be checked for everything that a key saw to be as it was: versions of dicts, addresses
// where an object is held by a list, a closure or a function, and the tensors, whose memory moves
// without any of this. It is checked from the roots on, so that an address is looked at only after
// what holds it was found unchanged; it holds no references.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "key_bytes.h"

namespace dlms {

// What a replay needs of the writer of keys.
class MovingParts {
 public:
  virtual ~MovingParts() = default;
  // Writes where a tensor lies and its layout. False: it has no memory of its own, or is a
  // parameter elsewhere.
  virtual bool place(PyObject* tensor, bool parameter) = 0;
  // Writes a number, text or bytes. False: it is something else.
  virtual bool plain(PyObject* item) = 0;
};

class Recipe {
 public:
  // From Python 3.13 on dicts have no versions: every key is then read anew.
  static constexpr bool kVersions = PY_VERSION_HEX < 0x030D0000;

  void holder(PyObject* object, PyObject* dict); // its class, and its attributes
  void type(PyObject* object);                   // its class alone
  void dict(PyObject* dict);
  void slot(PyObject* const* where);  // what a place holds
  void plain(PyObject* const* where); // a place that holds a number or text, written in every key
  void list(PyObject* list);
  void tuple(PyObject* tuple);
  void tensor(PyObject* tensor, bool parameter);
  void impossible() { possible_ = false; } // something was seen whose changes do not show

  bool possible() const { return possible_; }
  // Writes the moving parts. False: something has changed, and what was written is void.
  bool replay(MovingParts* parts) const;

  Digest digest; // of the parts that do not move

 private:
  enum class Check : char { kHolder, kType, kDict, kSlot, kPlain, kSize, kTensor, kParameter };
  struct Item {
    Check check;
    const void* where;                // the object, or the place that holds it
    const void* expected = nullptr;   // its class, or what the place holds
    const void* attributes = nullptr; // the dict of a holder
    uint64_t number = 0;              // version or size
  };
  bool holds(const Item& item, MovingParts* parts) const;

  std::vector<Item> items_;
  bool possible_ = kVersions;
};

} // namespace dlms
