// The instruction sets that a build holds; DLMS_HAVE_X86 is set by CMake on x86-64.
#pragma once

#include "fused_row.h"

namespace dlms {
namespace baseline {
extern const Kernels kKernels;
}
#if defined(DLMS_HAVE_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif
} // namespace dlms
