"""May these models be merged, by what their configs and tokenizers say; with a word for each refusal.

Every refusal is a judgement on what cannot be seen in the tensors, and can be wrong: so each prints the word that
allows it, and the word goes into the recipe that OUT keeps.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Final

from ties_dist.errors import CheckpointError
from ties_dist.inputs.compatibility import Config, Difference, differences
from ties_dist.inputs.tokenizers import Agreement, Tokenizer, compare_tokens
from ties_dist.messages import listing

logger = logging.getLogger(__name__)

TOKENIZER: Final = "tokenizer"
"""The word for other tokens under the same ids."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model. label: how messages call it."""

    label: str
    config: Config | None
    tokenizer: Tokenizer


@dataclass(frozen=True, kw_only=True)
class _Finding:
    word: str
    line: str


def judge(base: Side, experts: Sequence[Side], *, allow: Collection[str], strict: bool) -> list[str]:
    """What to say of experts that may be merged; one line an expert. strict: what is only said refuses, too.

    Raises CheckpointError for all that refuses and is not allowed.
    """
    refused: list[_Finding] = []
    notes: list[str] = []
    for expert in experts:
        found = differences(base.config, expert.config)
        against = [each for each in found if each.grade == "refused" or (strict and each.grade == "warned")]
        refused += [_Finding(word=each.word, line=f"{expert.label}: {each}") for each in against]
        notes += _said(expert.label, [each for each in found if each not in against])
        notes += [f"{expert.label}: {each}; allowed" for each in against if each.word in allow]
        tokens = compare_tokens(base.tokenizer, expert.tokenizer)
        if tokens is not None and tokens.refused:
            refused.append(_Finding(word=TOKENIZER, line=f"{expert.label}: {_tokens(tokens)}"))
        if tokens is not None and tokens.other and (not tokens.refused or TOKENIZER in allow):
            notes.append(f"{expert.label}: {_tokens(tokens)}")
        if tokens is not None and tokens.renamed:
            notes.append(
                f"{expert.label}: {tokens.renamed:,} added or reserved tokens have other names than the base's"
            )
    if remaining := [each for each in refused if each.word not in allow]:
        raise _refusal(remaining)
    return notes


def _refusal(refused: Sequence[_Finding]) -> CheckpointError:
    words = ", ".join(dict.fromkeys(each.word for each in refused))
    return CheckpointError(
        listing(
            "tensors of the same shapes mean other things in these models:",
            [each.line for each in refused],
            "A merge would mix them under the base's config and tokenizer: name the base that each was tuned from. "
            f"Where you know better, `ties_dist: {{allow: [{words}]}}` or --allow WORD merges all the same.",
        )
    )


def _said(label: str, found: Sequence[Difference]) -> list[str]:
    """One line of what is worth one; the rest goes to the log of `-v`."""
    if rest := [each.word for each in found if each.grade == "noted"]:
        logger.debug("%s: config.json also differs in %s; the base's is taken", label, ", ".join(rest))
    said = [str(each) for each in found if each.grade == "warned"]
    return [f"{label}: config.json has {', '.join(said)}; the base's is taken"] if said else []


def _tokens(found: Agreement) -> str:
    assert found.example is not None
    i, base, expert = found.example
    there = f"{i} is {short(expert)}, in the base {short(base)}"
    return f"the tokenizer gives {found.other:,} of {found.shared:,} ids to other tokens than the base's: {there}"
