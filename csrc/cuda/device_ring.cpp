#include "device_ring.h"

#include <string>

namespace dlms::cuda {
namespace {

void check_size(int64_t depth, size_t slot_bytes) {
  if (depth < 1 || slot_bytes == 0)
    throw std::invalid_argument("a ring of " + std::to_string(depth) + " slots of " +
                                std::to_string(slot_bytes) + " bytes, expected at least 1 of each");
}

} // namespace

DeviceRing::DeviceRing(void* memory, int64_t depth, size_t slot_bytes)
    : memory_(memory), depth_(depth), slot_bytes_(slot_bytes) {
  check_size(depth, slot_bytes);
}

DeviceRing::DeviceRing(int64_t depth, size_t slot_bytes, int device)
    : driver_(&driver()), depth_(depth), slot_bytes_(slot_bytes) {
  check_size(depth, slot_bytes);
  context_ = std::make_unique<PrimaryContext>(*driver_, device);
  const ContextScope scope(*driver_, context_->get());
  DevicePtr address = 0;
  driver_->check(
      driver_->memory_allocate(&address, static_cast<size_t>(depth) * slot_bytes), "cuMemAlloc");
  memory_ = reinterpret_cast<void*>(static_cast<uintptr_t>(address));
}

DeviceRing::~DeviceRing() {
  if (driver_ == nullptr || memory_ == nullptr) return;
  Context previous = nullptr;
  if (driver_->context_push(context_->get()) != 0) return;
  driver_->memory_free(static_cast<DevicePtr>(reinterpret_cast<uintptr_t>(memory_))); // waits
  driver_->context_pop(&previous);
}

int64_t DeviceRing::past_slot(int64_t k) const {
  if (k < 0 || k >= depth_ || newest_ < 0)
    throw std::out_of_range("m_{n-" + std::to_string(k) + "} of a ring of " +
                            std::to_string(depth_) +
                            (newest_ < 0 ? " slots that holds nothing yet" : " slots"));
  return (newest_ - k + depth_) % depth_;
}

} // namespace dlms::cuda
