#include "graph_key.h"

#include <atomic>
#include <list>
#include <memory>

#include "../tensor_view.h"
#include "key_writer.h"

namespace py = pybind11;

namespace dlms {
namespace {

constexpr size_t kRecipes =
    16;                      // that are kept; one is some 40 bytes for each attribute of a network
constexpr int kPatience = 3; // recipes in a row that did not hold for one run
constexpr int kRest = 32;    // keys before the next recipe is tried then

std::atomic<uint64_t> walks{0};

// The latest recipe for some objects; all under the GIL.
struct Known {
  uint64_t owner;
  bool tensor_attributes;
  std::vector<const void*> roots;
  std::shared_ptr<const Recipe> recipe;
  int misses = 0, resting = 0;
};

// The most recently used first.
std::list<std::shared_ptr<Known>>& all_known() {
  static auto* known = new std::list<std::shared_ptr<Known>>;
  return *known;
}

std::shared_ptr<Known> known_of(
    uint64_t owner, bool tensor_attributes, std::vector<const void*> roots) {
  auto& all = all_known();
  for (auto at = all.begin(); at != all.end(); ++at) {
    const Known& known = **at;
    if (known.owner != owner || known.tensor_attributes != tensor_attributes) continue;
    if (known.roots != roots) continue;
    all.splice(all.begin(), all, at);
    return all.front();
  }
  all.push_front(
      std::make_shared<Known>(Known{owner, tensor_attributes, std::move(roots), nullptr}));
  if (all.size() > kRecipes) all.pop_back();
  return all.front();
}

// A number or a list could be another one at the same address.
bool can_be_root(PyObject* object) {
  if (PyTuple_Check(object) || PyList_Check(object) || PyDict_Check(object)) return false;
  const Kind kind = kind_of(object);
  return kind == Kind::kModule || kind == Kind::kPlainObject || kind == Kind::kFunction ||
         kind == Kind::kMethod || (kind == Kind::kByAddress && PyCallable_Check(object));
}

// Returns the path of a parameter of the network that is elsewhere, or "".
std::string walk(Writer* writer, py::handle modules) {
  ++walks;
  std::string stray;
  bool first = true;
  for (const py::handle item : modules) {
    writer->root(item.ptr(), first);
    if (first) stray = writer->stray;
    first = false;
  }
  return stray;
}

// Writes what `modules` hold. Returns the digest of the settled part.
Digest write_modules(Writer* writer, Known* known, py::handle modules, std::string* stray) {
  if (const auto recipe = known->recipe) {
    if (recipe->replay(writer)) {
      known->misses = 0;
      return recipe->digest;
    }
    writer->moving.clear();
    known->recipe = nullptr;
    if (++known->misses >= kPatience) known->resting = kRest;
  }
  const bool record = Recipe::kVersions && (known->resting == 0 || --known->resting == 0);
  auto recipe = std::make_shared<Recipe>();
  if (record) writer->record(recipe.get());
  *stray = walk(writer, modules);
  writer->record(nullptr);
  recipe->digest = Digest::of(writer->settled);
  if (record && recipe->possible() && stray->empty()) known->recipe = recipe;
  return recipe->digest;
}

} // namespace

KeyAnswer graph_key(uint64_t owner, const py::dict& inputs, py::handle options, py::handle modules,
    bool tensor_attributes) {
  const auto first = inputs.begin();
  RawTensor state;
  if (first == inputs.end() || !raw_tensor(first->second, &state))
    throw py::value_error("a run needs at least one input tensor");
  Writer writer(state.device);
  KeyAnswer answer;
  answer.key.owner = owner;
  const py::int_ number(owner);
  writer.value(number.ptr(), 0);
  for (const auto& [name, item] : inputs) writer.input(name.ptr(), item.ptr());
  writer.value(options.ptr(), 0);
  std::string& bytes = answer.key.bytes;
  bytes.assign(writer.settled.data(), writer.settled.size());
  bytes.append(writer.moving.data(), writer.moving.size());
  answer.key.coarse = bytes.size();
  writer.settled.clear();
  writer.moving.clear();

  writer.with_tensor_attributes(tensor_attributes);
  std::vector<const void*> roots;
  bool recordable = true;
  for (const py::handle item : modules) {
    roots.push_back(item.ptr());
    recordable = recordable && can_be_root(item.ptr());
  }
  Digest digest;
  if (recordable) {
    const auto known = known_of(owner, tensor_attributes, std::move(roots));
    digest = write_modules(&writer, known.get(), modules, &answer.stray);
  } else {
    answer.stray = walk(&writer, modules);
    digest = Digest::of(writer.settled);
  }
  bytes.append(reinterpret_cast<const char*>(&digest), sizeof digest);
  bytes.append(writer.moving.data(), writer.moving.size());
  return answer;
}

uint64_t key_walks() {
  return walks.load();
}

} // namespace dlms
