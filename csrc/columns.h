// Columns of a row, as in python/dlms_engine/ops/layout.py, for the CPU and the CUDA kernels.
#pragma once

namespace dlms {

enum Column : int { kCSkip = 0, kCOut = 1, kA = 2, kCIn = 3, kGuidance = 4, kSlot = 5, kB = 6 };

} // namespace dlms
