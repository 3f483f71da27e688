"""The operators of lightning_lrtt: schemas and fakes, kernels by device, and a plain PyTorch reference.

Importing this module registers ``torch.ops.lrtt.*``. `lightning_lrtt.ops.reference` computes the same numbers from the
same words in plain PyTorch, slowly; tests use it as the oracle.
"""

from lightning_lrtt.ops import (  # noqa: F401  registers the operators
    hopfield_kernels,
    io_kernels,
    kernels,
    product_kernels,
    schema,
    segment_kernels,
    weight_kernels,
)
from lightning_lrtt.ops.schema import COUNTER, COUNTS, CYCLE, FIXED_POINT, KEY, STATE_SIZE, STEP, A, B, C

__all__ = ["COUNTER", "COUNTS", "CYCLE", "FIXED_POINT", "KEY", "STATE_SIZE", "STEP", "A", "B", "C"]
