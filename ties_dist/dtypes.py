"""The types that numbers are stored and computed in, by every name they have: each table stands here, once.

Three vocabularies meet: a safetensors header's (`BF16`), torch's, which the loops use too (`bfloat16`), and what numpy
and LLVM call the bits. Without numpy or torch: catalogues are read with neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Literal, cast

if TYPE_CHECKING:
    import torch

# -- as a header has them

DTYPE_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits per element of every dtype safetensors 0.8 knows."""
ITEM_BYTES: Final = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0}
QUANTISED: Final = frozenset(dtype for dtype, bits in DTYPE_BITS.items() if dtype.startswith("F") and bits <= 8)
"""Floats of which a weight needs a scale."""
PACKING: Final = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
"""Integers that codes are packed into."""
TORCH_NAMES: Final[Mapping[str, str]] = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Of what may be merged or copied from memory."""

# -- as the loops compute with them

DType = Literal["float32", "bfloat16", "float16", "bool", "int32", "int64"]
TYPES: Final = {header: cast(DType, TORCH_NAMES[header]) for header in ("F32", "F16", "BF16")}
"""Of mergeable tensors, by their name in a header."""
MERGEABLE: Final = frozenset(TYPES)
FLOATS: Final = MERGEABLE | {"F64"}
HEADER_DTYPES: Final[Mapping[str, str]] = {dtype: header for header, dtype in TYPES.items()}
STORED: Final[Mapping[DType, str]] = {"float32": "<f4", "bfloat16": "<u2", "float16": "<f2"}
"""For numpy, which has no bfloat16: its bits."""
LLVM_TYPES: Final[Mapping[DType, str]] = {
    "float32": "float", "bfloat16": "i16", "float16": "half", "bool": "i1", "int32": "i32", "int64": "i64",
}  # fmt: skip
LOOP_BYTES: Final[Mapping[DType, int]] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "int64": 8, "bool": 1,
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """By torch's own name. Imports torch: 1.5 s that most commands do not spend."""
    import torch

    return cast("torch.dtype", getattr(torch, name))
