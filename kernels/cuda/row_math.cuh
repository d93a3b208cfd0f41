// Arithmetic and memory access shared by the forward and backward kernels of the fused row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "columns.h"

namespace dlms::cuda {

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

// Numbers of the network as state, element for element.
template <class S, class F, int V>
__device__ __forceinline__ Pack<S, V> widen(const Pack<F, V>& v) {
  Pack<S, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.at[j] = to_state<S>(v.at[j]);
  return out;
}
// bfloat16 is the upper half of a float: one instruction an element, where the conversion of an
// upper half takes two.
template <>
__device__ __forceinline__ Pack<float, 8> widen(const Pack<__nv_bfloat16, 8>& v) {
  Pack<float, 8> out;
  uint32_t words[4];
  memcpy(words, &v, sizeof(words));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out.at[2 * i] = __uint_as_float(words[i] << 16);
    out.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
  return out;
}

// One 16-byte word. Spelt out and volatile: loads stay in the order in which they are written, so a
// kernel that names all of them before its arithmetic waits for memory once. Left to itself the
// assembler moves each to its first use to save registers, and every one is a wait of its own.
__device__ __forceinline__ uint4 load_word(const uint4* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(__cvta_generic_to_global(p))
      : "memory");
  return v;
#else
  return *p;
#endif
}

// The word if `wanted`, else `otherwise` and no access. A predicate instead of a branch: after a
// branch the assembler merges the two outcomes, and to merge it waits for the load.
__device__ __forceinline__ uint4 load_word_if(const uint4* p, bool wanted, uint4 otherwise) {
  uint4 v = otherwise;
#ifdef __CUDA_ARCH__
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(__cvta_generic_to_global(p)), "r"(static_cast<unsigned>(wanted))
      : "memory");
#else
  if (wanted) v = *p;
#endif
  return v;
}

// One number of a row, in the same order; no kernel writes the row that it reads.
__device__ __forceinline__ float load_number(const float* p) {
#ifdef __CUDA_ARCH__
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *p;
#endif
}
__device__ __forceinline__ double load_number(const double* p) {
#ifdef __CUDA_ARCH__
  double v;
  asm volatile("ld.global.nc.f64 %0, [%1];" : "=d"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
#else
  return *p;
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
    for (int i = 0; i < kWords; ++i) words[i] = load_word(reinterpret_cast<const uint4*>(p) + i);
    memcpy(&out, words, sizeof(out));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out.at[j] = j < count ? p[j] : T(0.0f);
  }
  return out;
}

// V aligned elements from p if `wanted`, else `otherwise` in each.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> load_if(const T* p, bool wanted, T otherwise) {
  constexpr int kWords = sizeof(Pack<T, V>) / sizeof(uint4);
  Pack<T, V> out;
#pragma unroll
  for (int j = 0; j < V; ++j) out.at[j] = otherwise;
  uint4 words[kWords];
  memcpy(words, &out, sizeof(out));
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    words[i] = load_word_if(reinterpret_cast<const uint4*>(p) + i, wanted, words[i]);
  }
  memcpy(&out, words, sizeof(out));
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
__device__ __forceinline__ int ring_slot(S number, int depth) {
  int slot = static_cast<int>(number);
  if (slot < 0 || slot >= depth) {
    slot %= depth;
    if (slot < 0) slot += depth;
  }
  return slot;
}

// The slot of m_{n-k}, 0 <= k < kDepth: (number - k) mod kDepth in few instructions, because the
// loads of the history wait for it. kMultiple makes a negative number positive.
template <int kDepth, class S>
__device__ __forceinline__ unsigned ring_slot_back(S number, int k) {
  constexpr unsigned kMultiple = (0x80000000u / kDepth + 2) * kDepth;
  return (static_cast<unsigned>(static_cast<int>(number)) + (kMultiple - k)) % kDepth;
}

// Slot of m_{n-k}: (slot - k) mod depth, for 0 <= k < depth.
__device__ __forceinline__ int slot_back(int slot, int k, int depth) {
  const int s = slot - k;
  return s < 0 ? s + depth : s;
}

} // namespace dlms::cuda
