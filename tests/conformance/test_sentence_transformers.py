"""sentence-transformers loads a merged embedding model as it loads its base: same pooling, all weights merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ties_dist

pytestmark = pytest.mark.slow


def embedder(folder: Path, shift: float) -> torch.Tensor:
    """Saves a tiny CLS-pooled BERT with a dense module; returns its embedding of a sentence."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    plain = folder.with_name(f"{folder.name}-bert")
    plain.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "merge", "models", "well"]
    (plain / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(plain)
    BertTokenizer(str(plain / "vocab.txt")).save_pretrained(plain)
    modules = [Transformer(str(plain)), Pooling(16, pooling_mode="cls"), Dense(16, 4), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += shift * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(str(folder))
    return torch.from_numpy(model.encode(["merge models well"]))[0]


@pytest.mark.filterwarnings("ignore")
def test_a_merged_embedding_model_pools_as_its_base(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base, expert = embedder(tmp_path / "base", 0.0), embedder(tmp_path / "expert", 0.3)
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert"), "parameters": {"weight": 1.0}}],
    }  # fmt: skip
    ties_dist.merge(recipe, tmp_path / "out")
    merged = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = torch.from_numpy(merged.encode(["merge models well"]))[0]
    assert [module["path"] for module in json.loads((tmp_path / "out" / "modules.json").read_text())][1:] == [
        "1_Pooling", "2_Dense", "3_Normalize",
    ]  # fmt: skip
    # base + 1 * (expert - base) is the expert, but for rounding; pooled otherwise, or by the base's dense, it is not.
    assert torch.dot(found, expert) > 0.9999
    assert torch.dot(found, base) < 0.99
