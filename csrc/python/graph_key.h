// The key of a captured run, read from live Python objects: what a graph would have frozen. It must
// change whenever replaying the graph would no longer be what running the network is, as far as
// that can be seen cheaply. Objects that have not changed since the last key of a run are not read
// again (key_recipe.h); the key is the same either way.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../cuda/graph_cache.h"

namespace dlms {

struct KeyAnswer {
  cuda::GraphKey key;
  std::string stray; // path of a parameter that is not on the state's device, or empty
};

// owner: number of the network. inputs: tensors by name, the state first; their shapes, dtypes and
// devices count, their values are copied in. options: whatever else the run depends on, values and
// containers of values. modules: objects whose parameters and settings it depends on.
// tensor_attributes: whether tensors that modules keep as plain attributes count.
KeyAnswer graph_key(uint64_t owner, const pybind11::dict& inputs, pybind11::handle options,
    pybind11::handle modules, bool tensor_attributes);

// How many keys so far were read from the objects themselves.
uint64_t key_walks();

} // namespace dlms
