#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace dlms {
namespace {

const Kernels& choose() {
#if defined(DLMS_HAVE_X86)
  const char* wanted = std::getenv("DLMS_CPU_ISA");
  const auto allowed = [wanted](const Kernels& candidate) {
    return wanted == nullptr || std::strcmp(wanted, candidate.name) == 0;
  };
  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // Every processor with AVX2 has F16C, which not every compiler can ask for by name.
  if (has_avx512 && allowed(avx512::kKernels)) return avx512::kKernels;
  if (__builtin_cpu_supports("avx2") && allowed(avx2::kKernels)) return avx2::kKernels;
#endif
  return baseline::kKernels;
}

} // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t first_bad_slot(const RowArgs& args) {
  const int64_t width = kB + args.depth;
  for (int64_t index = 0; index < segments(args); ++index) {
    const int64_t at = index * width + kSlot;
    const double slot = args.state == Dtype::kFloat64
                            ? static_cast<const double*>(args.row)[at]
                            : static_cast<double>(static_cast<const float*>(args.row)[at]);
    // Written so that NaN fails too.
    if (!(slot >= 0 && slot < static_cast<double>(args.depth))) return index;
  }
  return -1;
}

} // namespace dlms
