// Which captured runs are kept. Knows nothing of CUDA or Python: a value is what its maker put in.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dlms::cuda {

// Everything that a captured run depends on, written out as bytes; equal bytes, equal run. The
// first `coarse` bytes leave out what the network's modules hold.
struct GraphKey {
  std::string bytes;
  size_t coarse = 0;
  uint64_t owner = 0; // number of the network: what invalidate() is called with
};

class GraphCache {
 public:
  using Value = std::shared_ptr<void>;
  enum class Claim { kFound, kFailed, kMine, kAgain };
  struct Answer {
    Claim claim = Claim::kAgain;
    Value value;        // kFound
    std::string reason; // kFailed
  };
  struct Stats {
    uint64_t captures = 0, replays = 0, evictions = 0, failures = 0;
    uint64_t bytes = 0;
    size_t entries = 0;
    double plain_seconds = 0, graph_seconds = 0; // of one run, summed over the measured entries
  };

  // std::invalid_argument: max_entries is 0.
  GraphCache(uint64_t max_bytes, size_t max_entries);
  GraphCache(const GraphCache&) = delete;
  GraphCache& operator=(const GraphCache&) = delete;

  // The value of `key`, now the latest used, or null. Many threads at once.
  Value find(const GraphKey& key);
  // As find, and where there is nothing the right to make it: kMine, until put, fail or release.
  // While another thread makes this key it waits and then says kAgain: look again with a new key,
  // for the first run of a network may have changed what the key is made of. The lock is not held
  // while a value is made.
  Answer claim(const GraphKey& key);
  // Ends the claim on `claimed` with a value under `key`. The oldest go while the bounds are
  // passed; the newest stays, whatever its size.
  void put(const GraphKey& claimed, const GraphKey& key, Value value, uint64_t bytes);
  // Ends a claim and remembers why there is no value: for this key, or if `coarse` for every state
  // of the network's modules.
  void fail(const GraphKey& claimed, std::string reason, bool coarse);
  // Ends a claim with nothing.
  void release(const GraphKey& claimed);
  // Seconds of one plain and one captured run of `key`, if it is still there.
  void measured(const GraphKey& key, double plain_seconds, double graph_seconds);

  bool contains(const GraphKey& key) const;
  std::string failure(const GraphKey& key) const; // empty: none
  void invalidate(uint64_t owner);                // 0: every network. Failures are forgotten too.
  Stats stats() const;
  uint64_t max_bytes() const { return max_bytes_.load(); }
  size_t max_entries() const { return max_entries_.load(); }
  void set_bounds(uint64_t max_bytes, size_t max_entries);

 private:
  struct Entry {
    Value value;
    uint64_t bytes = 0, owner = 0;
    double plain_seconds = 0, graph_seconds = 0;
    std::atomic<uint64_t> used{0}; // tick of the latest use: changes under the shared lock
  };
  struct Failure {
    uint64_t owner = 0;
    std::string reason;
  };
  struct Making {
    uint64_t owner = 0;
    bool stale = false; // invalidated meanwhile: the value is not kept
  };
  using Entries = std::unordered_map<std::string, std::unique_ptr<Entry>>;
  using Dropped = std::vector<Value>; // destroyed after the lock is free: they may call anything

  void evict(const std::string& newest, Dropped* dropped);
  const Failure* failed(const GraphKey& key) const;

  mutable std::shared_mutex mutex_;
  std::condition_variable_any changed_;
  Entries entries_;
  std::unordered_map<std::string, Making> making_; // by coarse key
  std::unordered_map<std::string, Failure> failures_;
  std::list<std::string> failure_order_;
  std::atomic<uint64_t> tick_{0}, replays_{0};
  uint64_t captures_ = 0, evictions_ = 0, failed_ = 0, bytes_ = 0;
  std::atomic<uint64_t> max_bytes_;
  std::atomic<size_t> max_entries_;
};

} // namespace dlms::cuda
