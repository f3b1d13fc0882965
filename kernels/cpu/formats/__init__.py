"""Weight formats, one class each: what a block of the file holds, and how its numbers are read.

| file | holds |
|---|---|
| `base.py` | what a description says, and what follows from it |
| `dense.py` | F32, F16, BF16 |
| `blocks.py` | blocks of 32 columns: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4 |
| `k_quants.py` | blocks of 256 columns: Q2_K to Q6_K, IQ4_XS |

A new format is a class in one of these files, and its name in the list below. What has no packing
of its own is dequantised, and kept as F32.
"""

from raygraft.kernels.cpu.formats.base import PANEL, Bytes, Format, Group
from raygraft.kernels.cpu.formats.blocks import IQ4_NL, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from raygraft.kernels.cpu.formats.dense import BF16, F16, F32
from raygraft.kernels.cpu.formats.k_quants import IQ4_XS, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K

FORMATS: dict[str, Format] = {
    kind.name: kind()
    for kind in (
        F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4,
        Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS,
    )
}  # fmt: skip


def format_of(type_name: str) -> Format:
    """The packing of a type; F32 for those without one."""
    return FORMATS.get(type_name, FORMATS["F32"])


__all__ = ["FORMATS", "PANEL", "Bytes", "Format", "Group", "format_of"]
