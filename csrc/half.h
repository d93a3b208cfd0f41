// bfloat16 and float16 as bit patterns, converted with round-to-nearest-even and quiet NaNs, the
// way torch does it. bfloat16 is integer shifts, which compilers vectorise; float16 uses F16C if
// compiled for it and the same rounding in software otherwise.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dlms::DLMS_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(Half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) { // infinity, NaN (made quiet)
    const uint32_t payload = (magnitude & 0x3ffu) << 13;
    return float_of(sign | 0x7f800000u | payload | (payload != 0 ? 0x400000u : 0u));
  }
  if (magnitude >= 0x400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f; // exact
  return float_of(sign | bits_of(subnormal));
#endif
}

inline Half half_of_float(float value) {
#if defined(__F16C__)
  return Half{static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u)
    return Half{static_cast<uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu))};
  if (magnitude >= 0x477ff000u) return Half{static_cast<uint16_t>(sign | 0x7c00u)}; // 65520 and up
  if (magnitude < 0x38800000u) { // below 2^-14: adding 0.5 leaves the subnormal in the low bits
    const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    return Half{static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return Half{static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13))};
#endif
}

template <class S, class N>
inline S widen(N value);
template <>
inline float widen<float, float>(float value) {
  return value;
}
template <>
inline double widen<double, double>(double value) {
  return value;
}
template <>
inline float widen<float, BFloat16>(BFloat16 value) {
  return float_of(static_cast<uint32_t>(value.bits) << 16);
}
template <>
inline float widen<float, Half>(Half value) {
  return half_to_float(value);
}

template <class N, class S>
inline N narrow(S value);
template <>
inline float narrow<float, float>(float value) {
  return value;
}
template <>
inline double narrow<double, double>(double value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16, float>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}
template <>
inline Half narrow<Half, float>(float value) {
  return half_of_float(value);
}

inline void widen_half(const Half* in, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(
        out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = half_to_float(in[i]);
}

inline void narrow_half(const float* in, Half* out, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
        _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) out[i] = half_of_float(in[i]);
}

} // namespace dlms::DLMS_ISA
