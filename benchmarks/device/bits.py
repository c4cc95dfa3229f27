"""The tests that need a GPU, as `tests/unit/compiler/test_cuda.py` has them, without pytest."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.device.gpu import first_gpu, open_driver
from benchmarks.device.parts import Bench, Teller, say


def run(bench: Bench, tell: Teller) -> None:
    driver = open_driver(bench)
    from tests import cuda_checks

    checks, same = cuda_checks.every_check(), 0
    with first_gpu(driver):  # kept, or every merge would make the context anew
        for done, check in enumerate(checks, start=1):
            began = time.monotonic()
            wrong = _tried(lambda check=check: cuda_checks.differences(check, bench.scratch))
            same += not wrong
            say(f"{check}: {'; '.join(wrong) or 'the same'}, {time.monotonic() - began:.1f} s")
            tell.row("Merges on both devices", checks=len(checks), done=done, same=same)
            if wrong:
                tell.check(str(check), holds=False, said="; ".join(wrong))
        wrong = _tried(lambda: cuda_checks.refusals(bench.scratch))
    tell.check("a NaN and an overflow are refused with the same words", holds=not wrong, said="; ".join(wrong))
    tell.note(
        f"every method in {', '.join(cuda_checks.TYPES)}, every option in bfloat16, one thread and "
        f"{cuda_checks.THREADS}, units of several sizes, tensors of {', '.join(map(str, cuda_checks.SHAPES.values()))}"
    )
    said = f"{same} of {len(checks)}"
    tell.check("merges have the processor's digest and counts", holds=same == len(checks), said=said)


def _tried(check: Callable[[], list[str]]) -> list[str]:
    """What differs; one check that fails must not hide the others."""
    try:
        return check()
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
