"""How a merge's loop may run, in words: apart from `kernel`, since the command line's help needs no numpy."""

from __future__ import annotations

from typing import Literal

KernelKind = Literal["auto", "compiled", "eager"]
