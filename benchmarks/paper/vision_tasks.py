"""Twelve labelled image tasks: characters drawn from real typefaces, and scikit-learn's handwritten digits.

An image is named by a text, `Lato-Bold.ttf U+0041 #2` or `digit 17`, and `draw` makes it; size and place of a glyph
follow from the text. So slices, groups and digests are those of the text tasks. The fonts are trdg's (some 100 files of
15 families) and matplotlib's (DejaVu, STIX).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tasks import Row, Task, build_task, package_directory

SIDE = 32
VARIANTS = 3
"""Images of one glyph; they are a group with those of the glyph's relatives."""
FAMILIES = (
    *("Aller", "CaviarDreams", "DejaVuSansMono", "DejaVuSerif", "DejaVuSans", "DroidSans", "Lato", "OpenSans"),
    *("Raleway", "RobotoCondensed", "Roboto", "Sansation", "STIXGeneral", "Walkway"),
)
"""Longer names first where one begins like another."""
SERIF, MONO = ("DejaVuSerif", "STIXGeneral"), ("DejaVuSansMono",)
UPPER, LOWER, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", "0123456789"
GREEK, CYRILLIC = "ΓΔΘΛΞΠΣΦΨΩαβγδζθλμξπσφψω", "БГДЖИЛПФЦЧШЩЪЫЮЯбвгджзиклцчшщъыюя"
ACCENTS = {"acute": "áéíóúÁÉÍÓÚ", "grave": "àèìòùÀÈÌÒÙ", "circumflex": "âêîôûÂÊÎÔÛ", "diaeresis": "äëïöüÄËÏÖÜ"}


@cache
def fonts() -> Mapping[str, Path]:
    latin = (package_directory("trdg") / "fonts" / "latin").glob("*.[ot]tf")
    bundled = (package_directory("matplotlib") / "mpl-data" / "fonts" / "ttf").glob("*.ttf")
    chosen = [p for p in bundled if p.name.startswith(("DejaVu", "STIXGeneral")) and "Display" not in p.name]
    return {path.name: path for path in sorted([*latin, *chosen])}


@cache
def _characters(font: str) -> frozenset[str]:
    from fontTools.ttLib import TTFont

    return frozenset(map(chr, TTFont(fonts()[font], lazy=True).getBestCmap()))


@cache
def _weight(font: str) -> int:
    from fontTools.ttLib import TTFont

    return int(TTFont(fonts()[font], lazy=True)["OS/2"].usWeightClass)


def family(font: str) -> str | None:
    return next((name for name in FAMILIES if font.startswith(name)), None)


def is_slanted(font: str) -> bool:
    return any(part in font for part in ("Italic", "Oblique", "It.", "Ita.", "LtIt", "BdIt"))


def glyphs(characters: str, chosen: Sequence[str] | None = None) -> Iterator[tuple[str, str, str]]:
    """(font, character, text of an image)."""
    for font in chosen if chosen is not None else fonts():
        for character in sorted(_characters(font) & set(characters)):
            for variant in range(VARIANTS):
                yield font, character, f"{font} U+{ord(character):04X} #{variant}"


def characters(which: str) -> Iterator[Row]:
    """Which character: the images of one font's glyph are a group."""
    for font, character, text in glyphs(which):
        yield f"{font} {character}", text, f"U+{ord(character):04X}"


def styles(label_of: Mapping[str, str], which: str = UPPER + LOWER) -> Iterator[Row]:
    """Something of the font: one character in all fonts of one family is a group. label_of: by font."""
    for font, character, text in glyphs(which, [font for font in fonts() if font in label_of]):
        yield f"{family(font)} {character}", text, label_of[font]


def digit_rows() -> Iterator[Row]:
    for index, label in enumerate(_digits()[1]):
        yield f"digit {index}", f"digit {index}", str(label)


def slant_rows() -> Iterator[Row]:
    return styles({f: "slanted" if is_slanted(f) else "upright" for f in fonts() if family(f)})


def weight_rows() -> Iterator[Row]:
    def label(weight: int) -> str | None:
        return "light" if weight <= 300 else "regular" if weight == 400 else "bold" if weight >= 700 else None

    named = {f: label(_weight(f)) for f in fonts() if family(f) not in (None, "Walkway")}  # Walkway says 400 for all
    return styles({f: name for f, name in named.items() if name})


def family_rows() -> Iterator[Row]:
    wanted = ("Aller", "CaviarDreams", "DejaVuSerif", "Lato", "Raleway", "RobotoCondensed", "Sansation", "Walkway")
    for font, character, text in glyphs(UPPER + LOWER, [f for f in fonts() if family(f) in wanted]):
        yield f"{font} {character}", text, str(family(font))


def stroke_rows() -> Iterator[Row]:
    kinds = {
        f: "serif" if family(f) in SERIF else "mono" if family(f) in MONO else "sans" for f in fonts() if family(f)
    }
    return styles(kinds, UPPER + LOWER + DIGITS)


def script_rows() -> Iterator[Row]:
    for label, which in (("Latin", UPPER + LOWER), ("Greek", GREEK), ("Cyrillic", CYRILLIC)):
        for font, character, text in glyphs(which):
            yield f"{font} {character}", text, label


def case_rows() -> Iterator[Row]:
    """Letters whose two forms differ in more than size."""
    for label, which in (("upper", "ABDEGHNQRT"), ("lower", "abdeghnqrt"), ("digit", DIGITS)):
        for font, character, text in glyphs(which):
            yield f"{font} {character}", text, label


def width_rows() -> Iterator[Row]:
    for font, character, text in glyphs(UPPER + LOWER, [f for f in fonts() if f.startswith("Roboto")]):
        yield f"{font} {character}", text, str(family(font))


def accent_rows() -> Iterator[Row]:
    for label, which in ACCENTS.items():
        for font, character, text in glyphs(which):
            yield f"{font} {character}", text, label


MERGED = {
    "digit": ("which handwritten digit is this?", "scikit-learn", digit_rows),
    "numeral": ("which printed digit is this?", "trdg", lambda: characters(DIGITS)),
    "greek": ("which of 24 Greek letters is this?", "trdg", lambda: characters(GREEK)),
    "cyrillic": ("which of 33 Cyrillic letters is this?", "trdg", lambda: characters(CYRILLIC)),
    "slant": ("is this letter slanted?", "trdg", slant_rows),
    "weight": ("is this letter light, regular or bold?", "trdg", weight_rows),
    "family": ("from which of 8 families is this letter?", "trdg", family_rows),
    "stroke": ("is this serif, sans or monospaced?", "trdg", stroke_rows),
}
HELD_OUT = {
    "script": ("is this letter Latin, Greek or Cyrillic?", "trdg", script_rows),
    "case": ("is this upper case, lower case or a digit?", "trdg", case_rows),
    "width": ("is this letter condensed?", "trdg", width_rows),
    "accent": ("which of 4 accents does this letter have?", "trdg", accent_rows),
}


def load(names: tuple[str, ...], sizes: dict[str, int], split_seed: int) -> tuple[Task, ...]:
    return tuple(build_task(name, *(MERGED | HELD_OUT)[name], sizes, split_seed) for name in names)


def letters() -> list[tuple[str, int]]:
    """What the base model is trained on: every Latin letter in every font, and which of 52 it is."""
    return [(text, (UPPER + LOWER).index(c)) for _, c, text in glyphs(UPPER + LOWER)]


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images, found.target


@cache
def _face(font: str, size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.truetype(str(fonts()[font]), size)


@cache
def draw(text: str) -> np.ndarray:
    """(SIDE, SIDE) uint8, white on black."""
    from PIL import Image, ImageDraw

    rng = random.Random(text)
    if text.startswith("digit "):
        pixels = np.round(_digits()[0][int(text.split()[1])] * (255 / 16)).astype(np.uint8)
        return np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    font, code, _ = text.split()
    face, character = _face(font, rng.choice((18, 20, 22, 24))), chr(int(code[2:], 16))
    left, top, right, bottom = face.getbbox(character)
    x = (SIDE - right - left) / 2 + rng.randint(-3, 3)
    y = (SIDE - bottom - top) / 2 + rng.randint(-3, 3)
    image = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(image).text((x, y), character, fill=255, font=face)
    return np.asarray(image)
