"""A process and the machine it is on, as they tell of themselves."""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Machine:
    """kind: what has to be the same on all machines for the same bytes; text: what to tell of this one.

    problems: all that speaks against it, one line each. Processors of one architecture differ in how much they compute
    at once, not in a bit of it; of different ones that is not proven.
    """

    kind: str
    text: str
    problems: tuple[str, ...] = ()


def peak_rss_bytes() -> int:
    """This process's largest resident set. Not `ru_maxrss`: it is inherited from the process that started this one."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
