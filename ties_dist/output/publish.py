"""OUT as a folder: what may be merged into it, and how a finished merge gets its names.

The old model stays until all new bytes are durable; then old index and shards go, new ones are renamed, the folder is
synced, and the index (or the single file) comes last: it is the commit point. Every step can be killed and repeated.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from ties_dist.errors import OutputError
from ties_dist.output.folder import OutFolder
from ties_dist.output.report import MergeReport
from ties_dist.planning.layout import INDEX_NAME, Layout
from ties_dist.storage.local import output_error, sync_folder, write_durably


def publish(
    out: OutFolder,
    layout: Layout,
    blocks: Mapping[str, Sequence[str]],
    report: MergeReport,
    companions: Mapping[str, bytes],
    origin: Mapping[str, object],
    check: Callable[[], None],
) -> None:
    """Give a finished merge its names.

    blocks: digests by shard. origin: what `verify` needs to merge a sample again. check: raises where another driver
    took over; called before every step, as what is done after that is done to the other's model.
    """
    check()
    if lost := [s.name for s in layout.shards if out.part(s, publishing=True) is None]:
        raise OutputError(f"{', '.join(lost)} vanished from {out.parts}. Run the same command again: it resumes.")
    manifest = {
        "fingerprint": out.fingerprint,
        "output_digest": report.output_digest,
        "companions": sorted(companions),
        "origin": origin,
        "shards": {s.name: {"size": s.size, "blocks": list(blocks[s.name])} for s in layout.shards},
    }
    pending = {s.name for s in layout.shards if out.partial(s.name).exists()}
    try:
        _remove_old(out, keep={s.name for s in layout.shards} - pending, companions=set(companions), check=check)
        # Before the companions: whoever replaces a half-published model has to know which files are its own.
        write_durably(out.state / "manifest.json", json.dumps(manifest), check)
        for name, content in companions.items():
            write_durably(out.path / name, content, check)
        write_durably(out.state / "report.json", report.to_json(), check)
        for shard in layout.shards:
            if shard.name in pending:
                check()
                out.partial(shard.name).replace(out.path / shard.name)
        sync_folder(out.path)
        if layout.index is not None:
            write_durably(out.path / INDEX_NAME, layout.index, check)
    except OSError as error:
        raise output_error(error, out.path) from error
    shutil.rmtree(out.run, ignore_errors=True)


def _remove_old(out: OutFolder, keep: set[str], companions: set[str], check: Callable[[], None]) -> None:
    """Remove what an older model left: its index first, so that it is no model from the first moment on."""
    shards = sorted([*out.path.glob("*.safetensors.index.json"), *out.path.glob("*.safetensors")])
    old = [out.path / INDEX_NAME, *(path for path in shards if path.name not in keep)]
    old += [out.path / name for name in sorted(out.companions() - companions)]
    retired = out.retire()
    for path in dict.fromkeys(old):
        if not (path.exists() or path.is_symlink()):
            continue
        check()
        with suppress(FileNotFoundError):  # we were replaced meanwhile, as the next check will say
            path.replace(retired / path.name).unlink()
    check()
    sync_folder(out.path)
    retired.rmdir()
