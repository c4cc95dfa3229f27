"""Standard output as tables are printed to it."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from ties_dist.errors import printable

PIPE_WIDTH = 200
"""Columns where there is no terminal to ask: rich would take 80 and cut names and numbers short."""


class Output(Console):
    """Standard output: what is shown of names is printable, and a broken pipe is the command's matter."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Left to the command, which knows whether its work is done; rich would end the process."""
        raise  # what it is called for


def console_of() -> Console:
    """Standard output; names and paths are printed as they are, and no table is squeezed into a pipe."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Output(highlight=False, markup=False, emoji=False, width=width)
