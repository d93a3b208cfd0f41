// Compiled once per instruction set, with DLMS_ISA = baseline, avx2 or avx512 (CMakeLists.txt).
#include "fused_row_backward.h"
#include "isa.h"

namespace dlms::DLMS_ISA {

#define DLMS_STRING_OF(name) #name
#define DLMS_STRING(name) DLMS_STRING_OF(name)

const Kernels kKernels = {DLMS_STRING(DLMS_ISA), forward, backward, scale};

} // namespace dlms::DLMS_ISA
