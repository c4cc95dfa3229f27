"""A linear head per task on the frozen base, then an expert per task: the whole encoder fine-tuned under that head.

The same head reads base, expert and merged encoders. It is trained on the base because that is what they all share: all
that is learnt later lies in the encoder, where merging acts, and no model has a head made to its measure. It sees only
the `probe` slice, so the `tune` slice still has something to teach. Learning rate and steps were chosen on `dev`, the
merges' settings are the paper's; nothing was chosen on `test`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from encoder import Tensors, embed, embed_texts, token_batches
from tasks import Example, Task
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

LEARNING_RATE, WARMUP_SHARE = 1e-4, 0.1  # linear up, then linearly down to 0
STEPS, BATCH = 150, 32
HEAD_PENALTY = 1e-3
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Head:
    weight: Tensor  # (labels, 384)
    bias: Tensor  # (labels,)

    def __call__(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, self.weight, self.bias)


def label_tensor(examples: tuple[Example, ...]) -> Tensor:
    return torch.tensor([example.label for example in examples])


def train_head(base: Tensors, tokenizer: Tokenizer, task: Task) -> Head:
    embeddings = embed_texts(base, tokenizer, [example.text for example in task.probe])
    return fit_head(embeddings, label_tensor(task.probe), len(task.labels))


def fit_head(embeddings: Tensor, labels: Tensor, classes: int) -> Head:
    """Penalised logistic regression to convergence: no seed takes part. embeddings: (examples, width)."""
    weight = torch.zeros(classes, embeddings.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(embeddings, weight, bias), labels) + HEAD_PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return Head(weight=weight.detach(), bias=bias.detach())


def fine_tune(
    base: Tensors,
    tokenizer: Tokenizer,
    heads: Sequence[Head],
    tasks: Sequence[Task],
    *,
    steps: int = STEPS,
    seed: int = SEED,
) -> Tensors:
    """All float tensors are trained; what gets no gradient (unseen tokens, pooler) stays as it was."""
    expert = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in base.items()}

    def loss(turn: int, batch: tuple[Example, ...]) -> Tensor:
        ((positions, token_ids, mask),) = token_batches(tokenizer, [example.text for example in batch], size=BATCH)
        return F.cross_entropy(heads[turn](embed(expert, token_ids, mask)), label_tensor(batch)[positions])

    optimise([tensor for tensor in expert.values() if tensor.requires_grad], loss, tasks, steps=steps, seed=seed)
    return {name: tensor.detach() for name, tensor in expert.items()}


def optimise(
    trained: Sequence[Tensor],
    loss: Callable[[int, tuple[Example, ...]], Tensor],
    tasks: Sequence[Task],
    *,
    steps: int,
    seed: int,
    peak: float = LEARNING_RATE,
) -> None:
    """AdamW without decay, in place. Several tasks take turns, batch by batch; loss: of a turn's task on a batch."""
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0, fused=True)
    draws = [random.Random(f"{seed} {task.name}") for task in tasks]
    queues: list[list[Example]] = [[] for _ in tasks]
    for step in range(steps):
        turn = step % len(tasks)
        if len(queues[turn]) < BATCH:
            queues[turn] = draws[turn].sample(tasks[turn].tune, len(tasks[turn].tune))
        batch, queues[turn] = tuple(queues[turn][:BATCH]), queues[turn][BATCH:]
        optimizer.param_groups[0]["lr"] = peak * min((step + 1) / (WARMUP_SHARE * steps), 1 - step / steps)
        optimizer.zero_grad()
        loss(turn, batch).backward()
        optimizer.step()


def correct(model: Tensors, tokenizer: Tokenizer, head: Head, examples: tuple[Example, ...]) -> Tensor:
    """Which examples the model gets right, (len(examples),) bool."""
    embeddings = embed_texts(model, tokenizer, [example.text for example in examples])
    return head(embeddings).argmax(dim=1) == label_tensor(examples)
