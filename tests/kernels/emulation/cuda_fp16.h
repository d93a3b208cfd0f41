#pragma once

struct __half {
  __half() = default;
  explicit __half(float v) : bits(static_cast<_Float16>(v)) {}
  _Float16 bits;
};

inline float __half2float(__half v) { return static_cast<float>(v.bits); }
inline __half __float2half_rn(float v) { return __half(v); }
