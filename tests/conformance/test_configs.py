"""Configs that belong together are never refused: saves of one model by transformers 4 and 5, bases and fine-tunes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ties_dist.inputs.compatibility import differences

transformers = pytest.importorskip("transformers")

FOLDER = Path(__file__).parent
PAIRS = json.loads((FOLDER / "config_pairs.json").read_text())["pairs"]
TEN_TIMES = {("meta-llama/Llama-2-7b-hf", "Trelis/Llama-2-7b-chat-hf-function-calling-v2")} | {
    ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct-1M")
}
"""Their norm epsilon is ten times the base's, or a tenth: refused as the rule has it, by the word `norm_eps`."""


def refused(base: Mapping[str, Any], expert: Mapping[str, Any]) -> list[str]:
    found = [*differences(base, expert), *differences(expert, base)]
    return sorted({each.word for each in found if each.grade == "refused"})


@pytest.mark.filterwarnings("ignore")
def test_no_config_saved_by_transformers_4_and_again_by_the_installed_one_is_refused() -> None:
    compared, alarms = 0, {}
    with zipfile.ZipFile(FOLDER / "configs-4.57.zip") as archive:
        for name in archive.namelist():
            kind, saved = name.removesuffix(".json"), json.loads(archive.read(name))
            try:
                again = json.loads(transformers.CONFIG_MAPPING[kind].from_dict(saved).to_json_string(use_diff=True))
                own = json.loads(transformers.CONFIG_MAPPING[kind]().to_json_string(use_diff=True))
            except Exception:  # a model type that is gone, or values that are refused now
                continue
            compared += 1
            if words := refused(saved, again) + refused(again, own):
                alarms[kind] = words
    assert compared > 350
    assert alarms == {}


def test_of_real_bases_and_fine_tunes_those_alone_are_refused_whose_norm_differs_tenfold() -> None:
    assert len(PAIRS) >= 50
    alarms = {}
    for pair in PAIRS:
        base, tuned = ({**pair["same"], **pair[only]} for only in ("base_only", "fine_tune_only"))
        if words := refused(base, tuned):
            alarms[pair["base"], pair["fine_tune"]] = words
    assert alarms == {pair: ["norm_eps"] for pair in TEN_TIMES}


def test_real_fine_tunes_of_longer_texts_are_said() -> None:
    (pair,) = (p for p in PAIRS if p["fine_tune"] == "togethercomputer/LLaMA-2-7B-32K")
    base, tuned = ({**pair["same"], **pair[only]} for only in ("base_only", "fine_tune_only"))
    assert [(each.word, each.grade) for each in differences(base, tuned)] == [("rope_scaling", "warned")]
