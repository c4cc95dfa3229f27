"""What the Hugging Face hub has of a model and its cache has not: names, sizes, and ranges of files.

huggingface_hub decides on endpoint, cache, offline mode and credentials; it is imported where it is used, since that
costs a second of `--help`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from ties_dist.errors import CheckpointError, PlanError
from ties_dist.messages import readable

ATTEMPTS = 4
BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Repository:
    """The wanted files of a model at one commit. sizes: bytes by name. cached: where those lie that are here."""

    name: str
    commit: str
    sizes: Mapping[str, int]
    cached: Mapping[str, Path]

    @cached_property
    def absent(self) -> Mapping[str, int]:
        return {name: size for name, size in self.sizes.items() if name not in self.cached}

    @property
    def folder(self) -> Path:
        """Of the cache, where something is there."""
        name, path = next(iter(self.cached.items()))
        return path.parents[len(PurePosixPath(name).parts) - 1]

    def download(self, name: str) -> Path:
        """One file into the cache. Raises whatever huggingface_hub does."""
        from huggingface_hub import hf_hub_download

        return self.cached.get(name) or Path(hf_hub_download(self.name, name, revision=self.commit))

    def place(self, name: str) -> str:
        """Where ranges of a file are served: behind the hub's redirection, so that it is asked once a file."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        return str(get_hf_file_metadata(hf_hub_url(self.name, name, revision=self.commit)).location)


def list_files(repository: str, revision: str | None, *, unwanted: Sequence[str]) -> Repository:
    """Raises whatever huggingface_hub does."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # exported without saying so

    info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    sizes = {each.rfilename: int(each.size or 0) for each in info.siblings or ()}
    inside = [name for name in sizes if not {"", "..", "/"}.intersection(PurePosixPath(name).parts)]
    names = list(filter_repo_objects(inside, ignore_patterns=list(unwanted)))
    found = {name: try_to_load_from_cache(repository, name, revision=info.sha) for name in names}
    return Repository(
        name=repository,
        commit=str(info.sha),
        sizes={name: sizes[name] for name in names},
        cached={name: Path(path) for name, path in found.items() if isinstance(path, str)},
    )


def cache_disk() -> Path:
    """A folder on the disk that downloads go to."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    return next(folder for folder in (cache, *cache.parents) if folder.exists())


def check_room(needed: int) -> None:
    """Raises PlanError where the disk of the hub's cache has no room for what is to be downloaded."""
    disk = cache_disk()
    if needed > (free := shutil.disk_usage(disk).free):
        raise PlanError(
            f"the disk of the hub's cache ({disk}) has {readable(free)} free; {readable(needed)} are to be downloaded. "
            "Free some space, or let HF_HUB_CACHE name a folder of a larger disk."
        )


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, and no more than these. Raises CheckpointError."""
    for attempt in range(ATTEMPTS):
        try:
            with _answer(url, start, stop) as (status, content):
                if status == 206 and len(content) == stop - start:
                    return content
        except Exception as error:  # requests' and httpx's errors share no root
            if attempt == ATTEMPTS - 1:
                raise CheckpointError(f"cannot be read from the hub: {type(error).__name__}: {error}") from error
            status = BUSY[0]
        if status not in BUSY:
            break
        time.sleep(0.5 * 2**attempt)
    raise CheckpointError(f"the hub does not give bytes {start:,} to {stop:,} of it (status {status}).")


@contextmanager
def _answer(url: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Status and content of an answer; its content is left unread where it is not the range asked for."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    ours = urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc  # no token goes to a store behind the hub
    headers = {**(build_hf_headers() if ours else {}), "Range": f"bytes={start}-{stop - 1}"}
    headers["Accept-Encoding"] = "identity"
    session: Any = get_session()
    if hasattr(session, "stream"):  # httpx, since version 1 of huggingface_hub
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=60) as answer:
            yield answer.status_code, answer.read() if answer.status_code == 206 else b""
    else:
        with session.get(url, headers=headers, stream=True, timeout=60) as answer:
            yield answer.status_code, answer.content if answer.status_code == 206 else b""
