#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float v) {
    uint32_t word;
    std::memcpy(&word, &v, 4);
    word += std::isnan(v) ? 0x10000u : 0x7fffu + ((word >> 16) & 1);  // to nearest even
    bits = static_cast<uint16_t>(word >> 16);
  }
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t word = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
