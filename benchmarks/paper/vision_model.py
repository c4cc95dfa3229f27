"""A small vision transformer, and how it is pretrained."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.vision_tasks import SIDE, draw, letters

PATCH, WIDTH, DEPTH, HEADS = 4, 128, 4, 4
STEPS, BATCH, LEARNING_RATE = 1500, 128, 1e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

        normed = self.norm1(x)
        attended = F.scaled_dot_product_attention(*(heads(m(normed)) for m in (self.query, self.key, self.value)))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Pre-norm (Dosovitskiy et al. 2021); the mean over the patches, a unit vector, is the image's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """images: (batch, SIDE, SIDE) float32. Returns (batch, WIDTH)."""
        cut = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.patches(cut) + self.position
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.norm(x).mean(1), dim=-1)


def images(texts: Sequence[str]) -> Tensor:
    """(len(texts), SIDE, SIDE) float32 in -1 to 1."""
    return torch.from_numpy(np.stack([draw(text) for text in texts])).float() / 127.5 - 1


def pretrain() -> dict[str, Tensor]:
    """Cross-entropy over the 52 letters, with a temperature of 1/16 on the unit vectors."""
    torch.manual_seed(0)
    model, head = VisionTransformer(), nn.Linear(WIDTH, 52)
    rows, rng = letters(), random.Random(0)
    trained = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    for _ in range(STEPS):
        batch = rng.sample(rows, BATCH)
        loss = F.cross_entropy(head(16 * model(images([t for t, _ in batch]))), torch.tensor([n for _, n in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
