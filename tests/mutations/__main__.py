"""`python -m tests.mutations --count 1000000 --seed 1`: documents made wrong, and whether anything comes of it.

No traceback, no hang, no control code in a message, no file touched outside OUT. Headers, indexes, adapter configs,
manifests, journals, locks and recipes, each as often as it is cheap. Failures are counted together by where they arise,
and printed with what to repeat the first by. The suite runs a short form.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations.trials import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind of document")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done, failures = run(Path(folder), count=given.count, seed=given.seed, only=given.only)
    for failure in failures.values():
        print(failure)
    seconds = time.monotonic() - began
    print(f"{sum(done.values()):,} mutations in {seconds:.0f} s: {dict(done)}; {len(failures)} kinds of failure")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
