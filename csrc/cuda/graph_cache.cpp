#include "graph_cache.h"

#include <stdexcept>

namespace dlms::cuda {

using Shared = std::shared_lock<std::shared_mutex>;
using Unique = std::unique_lock<std::shared_mutex>;

GraphCache::GraphCache(uint64_t max_bytes, size_t max_entries)
    : max_bytes_(max_bytes), max_entries_(max_entries) {
  if (max_entries == 0) throw std::invalid_argument("max_entries is 0, expected at least 1");
}

GraphCache::Value GraphCache::find(const GraphKey& key) {
  const Shared lock(mutex_);
  const auto found = entries_.find(key.bytes);
  if (found == entries_.end()) return nullptr;
  found->second->used.store(++tick_);
  ++replays_;
  return found->second->value;
}

const GraphCache::Failure* GraphCache::failed(const GraphKey& key) const {
  auto found = failures_.find(key.bytes);
  if (found == failures_.end()) found = failures_.find(key.bytes.substr(0, key.coarse));
  return found == failures_.end() ? nullptr : &found->second;
}

GraphCache::Answer GraphCache::claim(const GraphKey& key) {
  Unique lock(mutex_);
  const auto found = entries_.find(key.bytes);
  if (found != entries_.end()) {
    found->second->used.store(++tick_);
    ++replays_;
    return {Claim::kFound, found->second->value, ""};
  }
  if (const Failure* failure = failed(key)) return {Claim::kFailed, nullptr, failure->reason};
  // Claims are by the coarse key: threads that meet a fresh network make its first run once.
  const std::string coarse = key.bytes.substr(0, key.coarse);
  if (making_.try_emplace(coarse, Making{key.owner, false}).second)
    return {Claim::kMine, nullptr, ""};
  changed_.wait(lock, [&] { return making_.count(coarse) == 0; });
  return {Claim::kAgain, nullptr, ""};
}

void GraphCache::put(const GraphKey& claimed, const GraphKey& key, Value value, uint64_t bytes) {
  Dropped dropped;
  {
    Unique lock(mutex_);
    const auto making = making_.find(claimed.bytes.substr(0, claimed.coarse));
    const bool stale = making != making_.end() && making->second.stale;
    if (making != making_.end()) making_.erase(making);
    ++captures_;
    if (stale) {
      dropped.push_back(std::move(value));
      lock.unlock();
      changed_.notify_all();
      return;
    }
    std::unique_ptr<Entry>& entry = entries_[key.bytes];
    if (entry != nullptr) {
      bytes_ -= entry->bytes;
      dropped.push_back(std::move(entry->value));
    }
    entry = std::make_unique<Entry>();
    entry->value = std::move(value);
    entry->bytes = bytes;
    entry->owner = key.owner;
    entry->used.store(++tick_);
    bytes_ += bytes;
    evict(key.bytes, &dropped);
  }
  changed_.notify_all();
}

void GraphCache::evict(const std::string& newest, Dropped* dropped) {
  while (entries_.size() > 1 &&
         (entries_.size() > max_entries_.load() || bytes_ > max_bytes_.load())) {
    auto oldest = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it)
      if (it->first != newest &&
          (oldest == entries_.end() || it->second->used.load() < oldest->second->used.load()))
        oldest = it;
    bytes_ -= oldest->second->bytes;
    ++evictions_;
    dropped->push_back(std::move(oldest->second->value));
    entries_.erase(oldest);
  }
}

void GraphCache::fail(const GraphKey& claimed, std::string reason, bool coarse) {
  {
    const Unique lock(mutex_);
    making_.erase(claimed.bytes.substr(0, claimed.coarse));
    const std::string key = coarse ? claimed.bytes.substr(0, claimed.coarse) : claimed.bytes;
    if (failures_.insert_or_assign(key, Failure{claimed.owner, std::move(reason)}).second)
      failure_order_.push_back(key);
    ++failed_;
    while (failure_order_.size() > 8 * max_entries_.load()) {
      failures_.erase(failure_order_.front());
      failure_order_.pop_front();
    }
  }
  changed_.notify_all();
}

void GraphCache::release(const GraphKey& claimed) {
  {
    const Unique lock(mutex_);
    making_.erase(claimed.bytes.substr(0, claimed.coarse));
  }
  changed_.notify_all();
}

void GraphCache::measured(const GraphKey& key, double plain_seconds, double graph_seconds) {
  const Unique lock(mutex_);
  const auto found = entries_.find(key.bytes);
  if (found == entries_.end()) return;
  found->second->plain_seconds = plain_seconds;
  found->second->graph_seconds = graph_seconds;
}

bool GraphCache::contains(const GraphKey& key) const {
  const Shared lock(mutex_);
  return entries_.count(key.bytes) != 0;
}

std::string GraphCache::failure(const GraphKey& key) const {
  const Shared lock(mutex_);
  const Failure* failure = failed(key);
  return failure == nullptr ? "" : failure->reason;
}

void GraphCache::invalidate(uint64_t owner) {
  Dropped dropped;
  const Unique lock(mutex_);
  for (auto& [key, making] : making_)
    if (owner == 0 || making.owner == owner) making.stale = true;
  for (auto it = entries_.begin(); it != entries_.end();) {
    if (owner != 0 && it->second->owner != owner) {
      ++it;
      continue;
    }
    bytes_ -= it->second->bytes;
    dropped.push_back(std::move(it->second->value));
    it = entries_.erase(it);
  }
  failure_order_.remove_if([&](const std::string& key) {
    const auto found = failures_.find(key);
    if (owner != 0 && found->second.owner != owner) return false;
    failures_.erase(found);
    return true;
  });
}

GraphCache::Stats GraphCache::stats() const {
  const Shared lock(mutex_);
  Stats stats;
  stats.captures = captures_;
  stats.replays = replays_.load();
  stats.evictions = evictions_;
  stats.failures = failed_;
  stats.bytes = bytes_;
  stats.entries = entries_.size();
  for (const auto& [key, entry] : entries_) {
    if (entry->graph_seconds <= 0) continue;
    stats.plain_seconds += entry->plain_seconds;
    stats.graph_seconds += entry->graph_seconds;
  }
  return stats;
}

void GraphCache::set_bounds(uint64_t max_bytes, size_t max_entries) {
  if (max_entries == 0) throw std::invalid_argument("max_entries is 0, expected at least 1");
  Dropped dropped;
  const Unique lock(mutex_);
  max_bytes_ = max_bytes;
  max_entries_ = max_entries;
  evict("", &dropped);
}

} // namespace dlms::cuda
