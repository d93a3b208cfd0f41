// The history ring in device memory: the last `depth` values of m, written in place and rotated by
// index. Rows name the slot (column 5), so that a captured run needs no more than the memory.
#pragma once

#include <cstdint>
#include <memory>

#include "driver.h"

namespace dlms::cuda {

class DeviceRing {
 public:
  // Allocates on a device; freed with this object, after the work that uses it.
  // std::invalid_argument: depth < 1 or no bytes. DriverError: no memory.
  DeviceRing(int64_t depth, size_t slot_bytes, int device);
  // Over memory of depth * slot_bytes that somebody else owns.
  DeviceRing(void* memory, int64_t depth, size_t slot_bytes);
  ~DeviceRing();
  DeviceRing(const DeviceRing&) = delete;
  DeviceRing& operator=(const DeviceRing&) = delete;

  void* data() const { return memory_; }
  int64_t depth() const { return depth_; }
  size_t slot_bytes() const { return slot_bytes_; }
  int64_t newest() const { return newest_; } // slot written last, -1 before the first
  int64_t next_slot() const { return (newest_ + 1) % depth_; }
  void wrote(int64_t slot) { newest_ = slot; }
  void reset() { newest_ = -1; }
  void* slot(int64_t index) const { return static_cast<char*>(memory_) + index * slot_bytes_; }
  // Where m_{n-k} lies. std::out_of_range before anything was written, or beyond the depth.
  void* past(int64_t k) const { return slot(past_slot(k)); }
  int64_t past_slot(int64_t k) const;

 private:
  const Driver* driver_ = nullptr; // of memory that is this object's own
  std::unique_ptr<PrimaryContext> context_;
  void* memory_ = nullptr;
  int64_t depth_;
  size_t slot_bytes_;
  int64_t newest_ = -1;
};

} // namespace dlms::cuda
