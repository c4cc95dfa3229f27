"""Everything that the objects of this folder share, said once: image, paths, sizes, names.

A generator rather than a kustomize base: a volume's path stands in the image, in mounts, in command lines and in Ray's
own YAML inside a ConfigMap, and patches reach only some of these. Values are checked here, as every user input is.
"""

from __future__ import annotations

import shlex
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

PlainPath = Annotated[str, StringConstraints(pattern=r"^/[\w./-]+$")]
"""Nothing in it that a shell reads: KubeRay pastes a RayJob's entrypoint into one without quotes."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=47)]
"""KubeRay's limit for a RayJob: it appends to it."""
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(Mi|Gi|Ti)$")]


class Settings(BaseModel):
    """Defaults are those of `rendered/`; `python -m cluster.render NAME --FIELD VALUE` replaces any of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is merged
    recipe: PlainPath = "/inputs/recipe.yml"
    out: PlainPath = "/output/merged"
    overwrite: bool = False
    """Replace another merge's finished model in `out`: for schedules whose inputs change."""

    # What runs it
    name: Name = "ties-dist-merge"
    namespace: Name = "merges"
    image: str = "registry.example.com/ties-dist:0.2.0"
    """`-cuda` is appended where GPUs are used."""
    ray_version: str = "2.60.0"
    uid: Annotated[int, Field(ge=1)] = 10001
    scratch: PlainPath = "/scratch"
    """An emptyDir: home and all caches."""
    scratch_size: Quantity = "10Gi"

    # Where it lies
    inputs: PlainPath = "/inputs"
    output: PlainPath = "/output"
    inputs_claim: Name = "ties-dist-inputs"
    output_claim: Name = "ties-dist-output"
    inputs_size: Quantity = "2Ti"
    output_size: Quantity = "1Ti"
    storage_class: str = "shared-rwx"
    """Of a file system that all nodes write to at once (NFS, Lustre, CephFS, Filestore, EFS), no bucket mount."""
    nfs: str = "nfs.example.com:/merges"
    """For `ray up`, which knows no claims: a server with folders `inputs` and `output`."""

    # How large
    workers: Annotated[int, Field(ge=1)] = 4
    worker_cpus: Annotated[int, Field(ge=1)] = 8
    worker_memory: Quantity = "8Gi"
    """A worker takes `memory_budget` and 0.5 GiB; the rest is page cache, which the limit counts, too."""
    gpu_worker_memory: Quantity = "16Gi"
    gpu_resource: str = "nvidia.com/gpu"
    head_cpus: Annotated[int, Field(ge=1)] = 2
    head_memory: Quantity = "4Gi"
    local_cpus: Annotated[int, Field(ge=1)] = 16
    local_memory: Quantity = "16Gi"
    memory_budget: Annotated[str, StringConstraints(pattern=r"^\d+(MiB|GiB)$")] = "2GiB"
    object_store_bytes: Annotated[int, Field(ge=80 << 20)] = 256 << 20
    """Only descriptions of units and counts go through it."""

    # How it is scheduled
    schedule: str = "0 2 * * *"
    time_zone: str = "Etc/UTC"
    start_seconds: Annotated[int, Field(ge=1)] = 3600
    """How long a RayJob waits for all its pods."""
    keep_seconds: Annotated[int, Field(ge=0)] = 600
    """How long an ended RayJob's cluster stays, for its logs."""
    retries: Annotated[int, Field(ge=0)] = 6
    """Further attempts of what ended with 75 or was killed."""
    kueue_queue: Name | None = None
    autodelete: bool = False
    spot: bool = False
    spot_nodes: dict[str, str] = {"karpenter.sh/capacity-type": "spot"}
    on_demand_nodes: dict[str, str] = {"karpenter.sh/capacity-type": "on-demand"}

    # Who may talk to it
    operator_namespace: Name = "kuberay-system"
    monitoring_namespace: Name = "monitoring"
    storage_cidrs: tuple[str, ...] = ("10.0.0.0/8",)
    """Of storage that pods reach by themselves; claims are mounted by their node, which no policy sees."""
    storage_ports: tuple[int, ...] = (2049, 443)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kueue_queue and self.autodelete:
            raise ValueError("kueue needs shutdownAfterJobFinishes, which KubeRay refuses beside deletion rules")
        return self

    @property
    def home(self) -> dict[str, str]:
        """Environment of every process, in the image as in the pods: nothing is written outside of `scratch` and /tmp,
        whatever the uid, and with a root file system that is read-only."""
        cache = f"{self.scratch}/cache"
        return {
            "HOME": self.scratch,
            "USER": "ties",
            "XDG_CACHE_HOME": cache,
            "TIES_DIST_CACHE": f"{cache}/ties_dist",
            "NUMBA_CACHE_DIR": f"{cache}/numba",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torchinductor",
            "CUDA_CACHE_PATH": f"{cache}/cuda",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": "passive",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "10",
        }

    def image_of(self, *, gpu: bool) -> str:
        return f"{self.image}-cuda" if gpu else self.image

    # Command lines: what of the command line the objects use, nothing else

    def plan(self) -> list[str]:
        """Finds users' mistakes from headers alone, on one small CPU, and an OUT that the merge would refuse."""
        return ["ties-dist", "plan", self.recipe, self.out, "--memory-budget", self.memory_budget, *self._further()]

    def merge_ray(self, *, gpu: bool) -> list[str]:
        """`--wait`: a false failure can start a second driver beside the first, which then waits for the lock."""
        command = ["ties-dist", "merge", self.recipe, self.out, "--executor", "ray", "--address", "auto"]
        command += ["--threads", str(self.worker_cpus), "--memory-budget", self.memory_budget, "--wait"]
        return command + (["--device", "cuda"] if gpu else []) + self._further()

    def merge_local(self) -> list[str]:
        command = ["ties-dist", "merge", self.recipe, self.out, "--executor", "local"]
        command += ["--threads", str(self.local_cpus), "--memory-budget", self.memory_budget, "--wait"]
        return command + self._further()

    def _further(self) -> list[str]:
        return ["--overwrite"] if self.overwrite else []

    def entrypoint(self, *, gpu: bool) -> str:
        return shlex.join(self.merge_ray(gpu=gpu))
