"""Every error the package raises on purpose.

    TiesDistError
    |-- RecipeError        (ValueError)       the recipe says something wrong, unknown or not supported yet     exit 2
    |-- CheckpointError    (ValueError)       an input is malformed, or base and experts do not fit together    exit 2
    |-- PlanError          (ValueError)       the work does not fit the memory, the disk or a limit             exit 2
    |-- OutputError        (OSError)          OUT cannot be used or written                                     exit 2
    |   `-- LockedError                       another run holds OUT                                             exit 2
    |-- NumericError       (ArithmeticError)  NaN or Inf in an input or an output                               exit 2
    |-- DamageError        (RuntimeError)     `verify` found bytes that are not what was written                exit 2
    |-- UnitError          (RuntimeError)     a unit of work failed again and again, on several workers         exit 2
    |-- ClusterError       (RuntimeError)     no worker came, or all were lost; the same command resumes        exit 75
    |-- StoppedError       (RuntimeError)     told to stop; the same command resumes                            exit 75
    |-- ProofError         (RuntimeError)     counts contradict a threshold: a bug or damaged inputs            exit 1
    `-- BugError           (RuntimeError)     an exception that nobody foresaw, in the work on an item          exit 1

The command line prints the message of any of these, of a bug its traceback too, and exits with `exit_status`.
Messages say what is wrong with which thing, what was found and expected, and what to do.
"""

from __future__ import annotations

import re
from typing import ClassVar

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
"""Control codes but tab and newline, what turns the direction of writing or takes no room, halves of characters."""


def printable(text: str) -> str:
    """Text as it may be shown: names in it come from files of others, and may hold what a terminal obeys."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class TiesDistError(Exception):
    """Root of the package's exceptions; `exit_status` is what the command line exits with.

    node, item: where it was met and what was worked on, where it is an executor that raises it.
    """

    exit_status: ClassVar[int] = 2
    node: str | None = None
    item: object = None

    def __str__(self) -> str:
        return printable(super().__str__())


class RecipeError(TiesDistError, ValueError):
    """The recipe says something wrong, unknown or not supported yet."""


class CheckpointError(TiesDistError, ValueError):
    """An input is malformed, or base and experts do not fit together."""


class PlanError(TiesDistError, ValueError):
    """The work does not fit the memory budget, the disk or a stated limit."""


class OutputError(TiesDistError, OSError):
    """OUT cannot be used or written."""


class LockedError(OutputError):
    """Another run holds OUT."""


class NumericError(TiesDistError, ArithmeticError):
    """NaN or Inf in an input, or a non-finite output from finite inputs."""


class DamageError(TiesDistError, RuntimeError):
    """Bytes on disk are not the bytes that were written."""


class UnitError(TiesDistError, RuntimeError):
    """One unit of work failed on worker after worker: another attempt would end in the same way."""


class ClusterError(TiesDistError, RuntimeError):
    """The cluster gave no worker in time, or lost all of them; the same command resumes."""

    exit_status: ClassVar[int] = 75


class StoppedError(TiesDistError, RuntimeError):
    """The run was told to stop; its work is kept and the same command resumes it."""

    exit_status: ClassVar[int] = 75


class ProofError(TiesDistError, RuntimeError):
    """The counts of a merge contradict its threshold: a bug, or inputs that changed while they were read."""

    exit_status: ClassVar[int] = 1


class BugError(TiesDistError, RuntimeError):
    """An exception that nobody foresaw, ours or of a method from elsewhere. args: what it said.

    trace: its traceback as Python formats it, which travels where a traceback cannot.
    """

    exit_status: ClassVar[int] = 1
    trace: str = ""

    def __str__(self) -> str:
        node = f" on node {self.node}" if self.node is not None else ""
        return (
            f"{super().__str__()}, at {self.item}{node}. This is a bug, of ties_dist or of a method from elsewhere: "
            "the traceback says where. What is finished is kept."
        )
