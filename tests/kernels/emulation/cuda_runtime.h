// Just enough of CUDA to run the kernels of kernels/cuda on the CPU, one thread after the other.
//
// A block's threads are fibers. A warp shuffle or a barrier hands over to the next fiber; as threads
// of a block pass the same number of them, one round of hand-overs completes each. That holds for
// these kernels (their branches around shuffles are uniform over a warp), not for CUDA in general.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__

struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x, y;
};

inline Index blockIdx;
inline Index threadIdx;

namespace emulation {

constexpr size_t kStack = 64 * 1024;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = false;
  int shuffles = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<double> exchange[2];  // by parity: a fast lane may be one shuffle ahead
inline const std::function<void()>* kernel;

inline void hand_over() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me].context, &scheduler);
}

inline void entry() {
  (*kernel)();
  fibers[threadIdx.x].done = true;
}

inline void run_block(Index block, unsigned threads, const std::function<void()>& body) {
  kernel = &body;
  fibers.resize(threads);
  exchange[0].assign(threads, 0);
  exchange[1].assign(threads, 0);
  for (Fiber& fiber : fibers) {
    fiber.done = false;
    fiber.shuffles = 0;
    fiber.stack.resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, entry, 0);
  }
  blockIdx = block;
  for (bool left = true; left;) {
    left = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].done) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibers[t].context);
      left = left || !fibers[t].done;
    }
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::hand_over(); }

inline double __shfl_down_sync(unsigned, double v, int offset) {
  const unsigned me = threadIdx.x;
  std::vector<double>& slots = emulation::exchange[emulation::fibers[me].shuffles++ % 2];
  slots[me] = v;
  emulation::hand_over();
  return me % 32 + static_cast<unsigned>(offset) < 32 ? slots[me + static_cast<unsigned>(offset)] : v;
}

inline float __uint_as_float(uint32_t word) {
  float v;
  std::memcpy(&v, &word, 4);
  return v;
}

// Built with -ffp-contract=off: each is one rounding.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }

using std::isfinite;
using std::max;
using std::min;
