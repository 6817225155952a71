"""In which number format matrices are multiplied on this machine, by engines and in training.

Versions lie on disk in bfloat16 either way.
"""

from functools import cache


@cache
def matrix_dtype() -> str:
    """Return `bfloat16`, or `float32` where the processor only emulates bfloat16, several times slower."""
    import torch

    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16"
    return "float32"
