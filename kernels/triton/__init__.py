"""The fused row in Triton: works from a wheel without compiled parts and inside torch.compile.

`device` holds the kernels, `launch` runs them, `operators` makes them `dlms_triton::` operators.
Import only where Triton is installed; `dlms_engine.kernels.register` checks that.
"""

import dlms_engine.ops  # noqa: F401  first: importing it registers this package, which reads `ops`
