// Arithmetic and memory access shared by the forward and backward kernels of the fused row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace dlms::cuda {

// Columns of a row; must match ops/layout.py.
constexpr int kColSkip = 0;
constexpr int kColOut = 1;
constexpr int kColA = 2;
constexpr int kColIn = 3;
constexpr int kColGuidance = 4;
constexpr int kColSlot = 5;
constexpr int kColB = 6;
constexpr int kMaxDepth = 512; // bounds the shared memory of the backward kernel

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kGroup = 4; // history slots in flight at once when the depth is a run-time number

// Explicitly rounded operations: the compiler may not contract them into fused multiply-adds, so
// the result has the bits of the eager reference.
__device__ __forceinline__ float mul(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ float add(float a, float b) {
  return __fadd_rn(a, b);
}
__device__ __forceinline__ float sub(float a, float b) {
  return __fsub_rn(a, b);
}
__device__ __forceinline__ double mul(double a, double b) {
  return __dmul_rn(a, b);
}
__device__ __forceinline__ double add(double a, double b) {
  return __dadd_rn(a, b);
}
__device__ __forceinline__ double sub(double a, double b) {
  return __dsub_rn(a, b);
}

template <class S>
__device__ __forceinline__ S to_state(float v) {
  return static_cast<S>(v);
}
template <class S>
__device__ __forceinline__ S to_state(double v) {
  return static_cast<S>(v);
}
template <class S>
__device__ __forceinline__ S to_state(__half v) {
  return static_cast<S>(__half2float(v));
}
template <class S>
__device__ __forceinline__ S to_state(__nv_bfloat16 v) {
  return static_cast<S>(__bfloat162float(v));
}

template <class T>
struct From {
  static __device__ __forceinline__ T state(double v) { return static_cast<T>(v); }
  static __device__ __forceinline__ T state(float v) { return static_cast<T>(v); }
};
template <>
struct From<__half> {
  static __device__ __forceinline__ __half state(float v) { return __float2half_rn(v); }
};
template <>
struct From<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 state(float v) { return __float2bfloat16_rn(v); }
};

// Elements one thread handles: 16 bytes of the network's dtype. It depends on that dtype alone, so
// which thread sums which element never depends on the batch or on the alignment.
template <class F>
constexpr int kLanes = 16 / static_cast<int>(sizeof(F));

template <class T, int V>
struct alignas(16) Pack {
  static_assert(V * sizeof(T) % 16 == 0);
  T at[V];
};

// Spelt out, because the compiler splits an assignment into four scalar stores when the values do
// not lie in neighbouring registers.
__device__ __forceinline__ void store_word(uint4* p, const uint4& v) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
      :
      : "l"(__cvta_generic_to_global(p)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
      : "memory");
#else
  *p = v; // the kernels also run on the CPU, emulated, in the tests
#endif
}

// V elements from p: whole 16-byte words, or the first `count` one by one (the rest zero).
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* p, bool whole, int count) {
  constexpr int kWords = sizeof(Pack<T, V>) / sizeof(uint4);
  Pack<T, V> out;
  if (whole) {
    uint4 words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(p)[i];
    memcpy(&out, words, sizeof(out));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = j < count ? p[j] : T(0.0f);
  }
  return out;
}

template <class T, int V>
__device__ __forceinline__ void store(T* p, const Pack<T, V>& v, bool whole, int count) {
  constexpr int kWords = sizeof(Pack<T, V>) / sizeof(uint4);
  if (whole) {
    uint4 words[kWords];
    memcpy(words, &v, sizeof(v));
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      store_word(reinterpret_cast<uint4*>(p) + i, words[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j < count) p[j] = v.at[j];
    }
  }
}

// The slot number in a row modulo the depth, as the reference takes it; inside the ring whatever
// the row holds: a wrong row must give wrong numbers, never a wild write.
template <class S>
__device__ __forceinline__ int ring_slot(const S* row, int depth) {
  int slot = static_cast<int>(row[kColSlot]);
  if (slot < 0 || slot >= depth) {
    slot %= depth;
    if (slot < 0) slot += depth;
  }
  return slot;
}

// Slot of m_{n-k}: (slot - k) mod depth, for 0 <= k < depth.
__device__ __forceinline__ int slot_back(int slot, int k, int depth) {
  const int s = slot - k;
  return s < 0 ? s + depth : s;
}

// index / count and the rest, in 32 bits when both fit (64-bit division is a long subroutine).
__device__ __forceinline__ void split(
    int64_t index, int64_t count, int64_t& quotient, int64_t& rest) {
  if (((index | count) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(index) / static_cast<uint32_t>(count);
    quotient = q;
    rest = static_cast<uint32_t>(index) - q * static_cast<uint32_t>(count);
  } else {
    quotient = index / count;
    rest = index - quotient * count;
  }
}

} // namespace dlms::cuda
