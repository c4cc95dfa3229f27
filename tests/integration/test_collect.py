"""`collect`: Fisher diagonals and Gram matrices against closed forms and plain autograd; killed, resumed, misused."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ties_dist
from tests.integration.command import run
from ties_dist.collecting import collect as collecting
from ties_dist.collecting.collect import collect
from ties_dist.errors import CheckpointError, OutputError, PlanError, RecipeError, StoppedError
from ties_dist.statistics.collected import ExpertStatistics

CODE = '''
import torch
from safetensors.torch import load_file

def make(checkpoint):
    """Logistic regression behind a hidden layer."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    module.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)

    def score(module, example):
        logit = module(torch.tensor(example["x"]))[0]
        return torch.nn.functional.logsigmoid(logit if example["y"] else -logit)

    return module, score

def tied(checkpoint):
    """The next token from the last, by one matrix of both."""
    module = torch.nn.Module()
    module.embed_tokens, module.lm_head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    module.lm_head.weight = module.embed_tokens.weight
    stored = load_file(checkpoint / "model.safetensors")
    module.embed_tokens.weight.data = next(iter(stored.values()))

    def score(module, example):
        logits = module.lm_head(module.embed_tokens(torch.tensor(example["x"])))
        return torch.log_softmax(logits, -1)[example["y"]]

    return module, score

def nothing(checkpoint):
    return None
'''
SHAPES = {"0.weight": (4, 3), "0.bias": (4,), "2.weight": (1, 4), "2.bias": (1,), "running_mean": (4,)}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`collect` of a small model, but for what is given."""
    draw = torch.Generator().manual_seed(0)
    (tmp_path / "model").mkdir()
    tensors = {n: torch.randn(s, generator=draw) for n, s in SHAPES.items()}
    save_file(tensors | {"steps": torch.tensor(3)}, tmp_path / "model" / "model.safetensors")
    lines = [{"x": torch.randn(3, generator=draw).tolist(), "y": i % 2} for i in range(11)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    name = f"made_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)

    def go(kind: Any = "fisher", **given: Any) -> ExpertStatistics:
        options: dict[str, Any] = {
            "checkpoint": tmp_path / "model", "data": tmp_path / "data.jsonl", "out": tmp_path / "store",
            "model": f"{name}:make",
        }  # fmt: skip
        return collect(kind, **options | given)

    return go


def by_hand(tmp_path: Path, count: int = 11) -> tuple[list[dict[str, np.ndarray]], list[np.ndarray], list[np.ndarray]]:
    """Per example: the gradients by the chain rule, the inputs of both layers; float64 numpy."""
    t = {n: v.double().numpy() for n, v in load_file(tmp_path / "model" / "model.safetensors").items()}
    gradients, first, second = [], [], []
    for line in (tmp_path / "data.jsonl").read_text().splitlines()[:count]:
        example = json.loads(line)
        x = np.array(example["x"], np.float32).astype(np.float64)
        h = np.tanh(t["0.weight"] @ x + t["0.bias"])
        p = 1 / (1 + np.exp(-(t["2.weight"] @ h + t["2.bias"])))
        out = example["y"] - p  # d log-likelihood / d logit
        hidden = (t["2.weight"].T @ out) * (1 - h**2)
        gradients.append(
            {"0.weight": np.outer(hidden, x), "0.bias": hidden, "2.weight": np.outer(out, h), "2.bias": out}
        )
        first.append(x)
        second.append(h)
    return gradients, first, second


def test_a_fisher_diagonal_is_the_mean_of_squared_gradients(job: Callable[..., Any], tmp_path: Path) -> None:
    store = job()
    gradients, _, _ = by_hand(tmp_path)
    for name in SHAPES.keys() - {"running_mean"}:
        expected = np.mean([g[name] ** 2 for g in gradients], axis=0)
        np.testing.assert_allclose(store.read(name), expected, rtol=1e-5)
    assert store.arrays.keys() == SHAPES.keys()
    assert not store.read("running_mean").any()  # no parameter: nothing is known of it
    assert store.origin.examples == 11


def test_a_gram_matrix_is_the_sum_of_outer_products_of_the_inputs(job: Callable[..., Any], tmp_path: Path) -> None:
    store = job("gram")
    _, first, second = by_hand(tmp_path)
    assert store.arrays.keys() == {"0.weight", "2.weight"}
    np.testing.assert_allclose(store.read("0.weight"), sum(np.outer(x, x) for x in first), rtol=1e-5)
    np.testing.assert_allclose(store.read("2.weight"), sum(np.outer(h, h) for h in second), rtol=1e-5)
    assert {name: entry.rows for name, entry in store.arrays.items()} == {"0.weight": 11, "2.weight": 11}


@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_small_budget_takes_a_tensor_at_a_time_and_gives_the_same(
    kind: str, job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = []
    real = collecting._collect

    def counted(kind: Any, subject: Any, group: Any, *rest: Any) -> None:
        groups.append([w.tensor for w in group])
        real(kind, subject, group, *rest)

    monkeypatch.setattr(collecting, "_collect", counted)
    whole = job(kind, out=tmp_path / "whole")
    assert len(groups) == 1
    cut = job(kind, out=tmp_path / "cut", memory_budget=12 * 16)
    assert len(groups) == 1 + 2
    assert whole.identity == cut.identity
    with pytest.raises(PlanError, match=r"needs 1\d\dB while it is collected; --memory-budget is 20B"):
        job(kind, out=tmp_path / "no", memory_budget=20)


def test_a_stopped_run_goes_on_with_what_is_left(
    job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = job(out=tmp_path / "whole").identity
    stop, taken = threading.Event(), []
    real = ExpertStatistics.add

    def add(self: ExpertStatistics, name: str, values: Any, **more: Any) -> None:
        real(self, name, values, **more)
        taken.append(name)
        stop.set()

    monkeypatch.setattr(ExpertStatistics, "add", add)
    with pytest.raises(StoppedError, match="the same command goes on"):
        job(memory_budget=12 * 12, stop=stop)
    found = ExpertStatistics.look(tmp_path / "store")
    assert found is not None and not found.finished and len(found.arrays) == 1
    with pytest.raises(CheckpointError, match=r"store is not finished \(1 arrays so far\)"):
        ExpertStatistics.open(tmp_path / "store")
    assert job(memory_budget=12 * 12).identity == expected
    assert len(taken) == len(set(taken)) == len(SHAPES)
    assert job().identity == expected and len(taken) == len(SHAPES)  # done before


def test_a_store_of_other_data_is_kept_unless_told(job: Callable[..., Any], tmp_path: Path) -> None:
    before = job().identity
    with pytest.raises(OutputError, match=r"statistics of something else \(calibration, examples differ\)"):
        job(examples=5)
    with pytest.raises(OutputError, match=r"statistics of something else \(kind differ\)"):
        job("gram")
    assert ExpertStatistics.open(tmp_path / "store").identity == before
    store = job(examples=5, fresh=True)
    expected = np.mean([g["0.bias"] ** 2 for g in by_hand(tmp_path, 5)[0]], axis=0)
    np.testing.assert_allclose(store.read("0.bias"), expected, rtol=1e-5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(OutputError, match="is not empty, and is no store of statistics"):
        job(out=tmp_path / "mine", fresh=True)


@pytest.mark.parametrize("fault", ["format", "chunk"])
def test_a_store_that_is_refused_is_collected_again_as_it_says(
    fault: str, job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = job().identity
    if fault == "format":
        text = (tmp_path / "store" / "zarr.json").read_text()
        (tmp_path / "store" / "zarr.json").write_text(text.replace('"version": 2', '"version": 1'))
        with pytest.raises(CheckpointError, match="store of format 1") as refused:
            ExpertStatistics.open(tmp_path / "store")
        with pytest.raises(OutputError, match=r"store of format 1.*--fresh"):
            job()
    else:
        (tmp_path / "store" / "0.bias" / "c" / "0").unlink()
        with pytest.raises(CheckpointError, match=r"chunk 0 of 0\.bias is lost") as refused:
            ExpertStatistics.open(tmp_path / "store").read("0.bias")
    said = str(refused.value).split("`ties-dist ")[1].split("`")[0]
    given = said.replace("CHECKPOINT", str(tmp_path / "model")).replace("FILE.jsonl", str(tmp_path / "data.jsonl"))
    assert run(capsys, *given.split(), "--model", f"made_{tmp_path.name}:make").status == 0
    store = ExpertStatistics.open(tmp_path / "store")
    assert store.identity == expected and store.read("0.bias").shape == (4,)


def test_lines_that_are_no_examples_are_all_told(job: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"x": [1, 2, 3], "y": 0}\nnonsense\n[1]\n')
    with pytest.raises(RecipeError, match=r"line 2: no JSON object.*\n.*line 3: no JSON object"):
        job(data=tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="has no examples"):
        job(data=tmp_path / "bad.jsonl")
    with pytest.raises(RecipeError, match=r"--data .*gone.jsonl cannot be read: No such file"):
        job(data=tmp_path / "gone.jsonl")


def test_functions_that_make_no_model_are_refused(job: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"must return \(torch module, function"):
        job(model=f"made_{tmp_path.name}:nothing")
    with pytest.raises(RecipeError, match="--model nowhere:make: No module named 'nowhere'"):
        job(model="nowhere:make")
    with pytest.raises(RecipeError, match=r"name a function as package.module:function"):
        job(model="json")
    with pytest.raises(PlanError, match=r"no config.json that names an architecture"):
        job(model=None)


def test_from_the_command_line_to_a_merge(
    job: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = run(
        capsys, "collect", "gram", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "store",
        "--model", f"made_{tmp_path.name}:make", "--json",
    )  # fmt: skip
    assert shown.status == 0 and json.loads(shown.out)["arrays"] == 2
    recipe = {"merge_method": "regmean", "models": [{"model": "model", "statistics": "store"}] * 2}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    assert run(capsys, "merge", tmp_path / "recipe.yml", tmp_path / "out").status == 0
    one, two = load_file(tmp_path / "model" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(one[n].float(), two[n].float(), atol=1e-6) for n in one)  # a model with itself
    shown = run(capsys, "collect", "gram", tmp_path / "model", "--data", tmp_path / "no", "--out", tmp_path / "s")
    assert shown.status == 2 and "Traceback" not in shown.err


@pytest.mark.parametrize(
    "names", [["embed_tokens.weight"], ["embed_tokens.weight", "lm_head.weight"], ["lm_head.weight"]], ids=len
)
def test_a_tied_parameter_has_one_diagonal_whatever_names_are_stored(
    names: list[str], job: Callable[..., Any], tmp_path: Path
) -> None:
    models = [torch.randn(7, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    lines = [{"x": i % 7, "y": 3 * i % 7} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    fishers = []
    for i, weight in enumerate(models):
        folder = tmp_path / f"m{i}"
        folder.mkdir()
        save_file({name: weight.clone() for name in names}, folder / "model.safetensors")
        store = job(checkpoint=folder, out=tmp_path / f"store{i}", model=f"made_{tmp_path.name}:tied")
        w, squares = weight.double().numpy(), np.zeros((7, 4))
        for line in lines:
            logits = w @ w[line["x"]]
            slope = (np.arange(7) == line["y"]) - np.exp(logits) / np.exp(logits).sum()
            gradient = np.outer(slope, w[line["x"]])
            gradient[line["x"]] += w.T @ slope
            squares += gradient**2 / len(lines)
        assert list(store.arrays) == names[:1]
        np.testing.assert_allclose(store.read(names[0]), squares, rtol=1e-4)
        fishers.append(squares)
    recipe = {"merge_method": "fisher", "models": [
        {"model": str(tmp_path / f"m{i}"), "statistics": str(tmp_path / f"store{i}")} for i in range(2)
    ]}  # fmt: skip
    ties_dist.merge(recipe, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = sum(f * m.double().numpy() for f, m in zip(fishers, models, strict=True)) / sum(fishers)
    assert sorted(merged) == names
    for found in merged.values():
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fisher", "gram"])
def test_a_hugging_face_classifier_is_run_as_its_config_says(kind: str, tmp_path: Path) -> None:
    """Its body's tensors may stand in the checkpoint without the head's prefix."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="pip install 'ties-dist[collect]'")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    folder = tmp_path / "model"
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    lines = [{"text": "a b c", "label": 1}, {"text": "g g f e", "label": 2}, {"text": "d", "label": 0}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    store = collect(kind, folder, tmp_path / "data.jsonl", tmp_path / "store")  # type: ignore[arg-type]

    tokens = [[2, 5, 6, 7, 3], [2, 11, 11, 10, 9, 3], [2, 8, 3]]
    if kind == "fisher":
        expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for ids, line in zip(tokens, lines, strict=True):
            model.zero_grad()
            torch.log_softmax(model(torch.tensor([ids])).logits, -1)[0, line["label"]].backward()
            for name, p in model.named_parameters():
                expected[name] += p.grad**2 / 3
        assert store.arrays.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_allclose(store.read(name), values, rtol=1e-4, atol=1e-12)
        return
    layer = model.bert.encoder.layer[0].attention.self.query
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()[0]))
    for ids in tokens:
        model(torch.tensor([ids]))
    expected_gram = sum(x.T @ x for x in seen)
    found = store.read("bert.encoder.layer.0.attention.self.query.weight")
    np.testing.assert_allclose(found, expected_gram, rtol=1e-4, atol=1e-6)
    assert "classifier.weight" in store.arrays and "bert.embeddings.word_embeddings.weight" not in store.arrays
