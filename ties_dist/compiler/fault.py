"""What happens where a mapped file became shorter: a line and an exit status, instead of a killed process.

Touching a page behind the new end is SIGBUS, met inside compiled code. A handler in Python only runs between two
instructions of Python, which never come; so this one is compiled, and calls nothing but write and _exit.
"""

from __future__ import annotations

import ctypes
import signal
from functools import lru_cache

import llvmlite.binding as llvm

from ties_dist.compiler.native import processor, target_machine

_CODE = """
@text = private constant [{size} x i8] c"{text}"
declare i64 @write(i32, ptr, i64)
declare void @_exit(i32)
define void @end(i32 %signal) {{
  %written = call i64 @write(i32 2, ptr @text, i64 {size})
  call void @_exit(i32 {status})
  unreachable
}}
"""


@lru_cache(maxsize=1)
def end_where_maps_fail(text: bytes, status: int) -> object:
    """From now on SIGBUS writes a text to standard error and ends this process. Returns what has to stay alive."""
    processor()
    escaped = "".join(f"\\{byte:02x}" for byte in text)
    code = llvm.parse_assembly(_CODE.format(size=len(text), text=escaped, status=status))
    code.verify()
    engine = llvm.create_mcjit_compiler(code, target_machine())
    engine.finalize_object()
    handler = ctypes.CDLL(None).signal
    handler.argtypes, handler.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    handler(int(signal.SIGBUS), engine.get_function_address("end"))
    return engine
