"""All that a process needs to work on one merge, wherever it runs: small enough to travel, the same for everyone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ties_dist.compiler.native import KernelStore
from ties_dist.errors import OutputError
from ties_dist.inputs.opening import opener
from ties_dist.output.folder import OutFolder
from ties_dist.output.holder import Holder
from ties_dist.output.lock import RunLock
from ties_dist.planning.options import Resources
from ties_dist.planning.plan import MergePlan
from ties_dist.values.items import Seat
from ties_dist.values.machine import Machine
from ties_dist.worker.matrices import KeptMatrices
from ties_dist.worker.merging import MergeStep, Worker
from ties_dist.worker.preflight import Expectation, machine, preflight
from ties_dist.worker.together import SHARED, CloseFile, ReadBlocks, WriteBlocks, size_for

if TYPE_CHECKING:
    from ties_dist.compiler.cuda import Gpus


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the work is, what a process may use for it, and where the output lies.

    holder: of OUT's lock. Whoever writes checks before each range that it still is, and stops where it is not.
    expected: what other machines compare theirs with.
    """

    plan: MergePlan
    resources: Resources
    folder: OutFolder
    holder: Holder
    expected: Expectation | None = None

    @property
    def threads(self) -> int:
        return self.resources.thread_count

    @property
    def projected_bytes(self) -> int:
        return self.plan.projected_bytes

    def away(self) -> Site:
        """As it travels. Leaves a file in OUT, by which others know that they see the same folder."""
        expected = Expectation(token=f"seen-{self.holder.token}")
        self.folder.place.put(f"{self.folder.run}/{expected.token}", b"")
        return replace(self, expected=expected)

    def rounds(self, nodes: int) -> Sequence[Callable[[MergeStep, Seat], str | None]]:
        """Leaves the file that they write, which is this driver's to remove (`tidy`)."""
        place, parts = self.folder.place, self.folder.parts
        if not place.reads_parts:
            return ()
        with closing(place.writer(parts)) as writer:
            writer.create(SHARED, size_for(nodes))
        return WriteBlocks(), CloseFile(), ReadBlocks(place, parts)

    def tidy(self) -> None:
        with suppress(OutputError):
            self.folder.place.remove(self.folder.partial(SHARED))

    def inspect(self, *, gpus: int = 0) -> Machine:
        """This machine, and all that speaks against merging on it."""
        assert self.expected is not None, "only what went away is compared"
        return machine(self.resources, gpus, preflight(self.plan, self.resources, self.folder, self.expected))

    def open(self, gpus: Gpus | None = None) -> MergeStep:
        """Inputs opened, a kernel to be compiled, the partial shards to be written."""
        place, fence = self.folder.place, RunLock(self.folder.place, me=self.holder).check
        worker = Worker(
            self.plan,
            opener(self.plan.models, self.resources.backend, reread_bytes=self.plan.reread_bytes),
            self.resources.kernel,
            KernelStore(self.resources.kernel_cache),
            gpus,
        )
        return MergeStep(
            worker,
            place.writer(self.folder.parts, fence),
            KeptMatrices(place, self.folder.matrices, fence),
        )
