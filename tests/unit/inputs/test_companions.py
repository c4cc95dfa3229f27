"""What goes beside the merged weights, what is left out and said, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from ties_dist.errors import CheckpointError
from ties_dist.inputs.companions import Companions, find_companions

GOES = {
    "config.json": "{}",
    "modules.json": "[]",
    "sentence_bert_config.json": "{}",
    "1_Pooling/config.json": "{}",
    "additional_chat_templates/tool_use.jinja": "{{ x }}",
    "tekken.json": "{}",
    "source.spm": "\x00",
    "bpe.codes": "a b",
    "dict.txt": "a 1",
    "entity_vocab.json": "{}",
    "normalizer.json": "{}",
    "params.json": "{}",
    "scheduler/scheduler_config.json": "{}",
    "LICENSE": "Apache",
}
STAYS = (
    *("model.safetensors", "model.safetensors.index.json", "adapter_config.json", "README.md", ".gitattributes"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin"),
    *("trainer_state.json", "all_results.json", "runs/Nov29/events.out.tfevents.1.host", "checkpoint-500/config.json"),
    *("latest", "zero_to_fp32.py", "eval/similarity_evaluation_results.csv", ".cache/huggingface/x", "train.log"),
)


def write(folder: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def found(
    folder: Path, *, modules: Sequence[str] = (), listed: Sequence[str] = (), is_model: bool = True
) -> Companions:
    return find_companions(folder, name="base", modules=modules, listed=listed, is_model=is_model)


def test_all_goes_that_is_neither_weights_nor_a_trace_of_training(tmp_path: Path) -> None:
    write(tmp_path, {**GOES, **dict.fromkeys(STAYS, "x")})
    taken = found(tmp_path, modules=("", "1_Pooling"))
    assert taken.sizes == {name: len(text) for name, text in GOES.items()}
    assert taken.nbytes == sum(map(len, GOES.values()))
    assert taken.notes == ()


def test_folders_with_weights_in_another_container_are_left_out_whole_and_named(tmp_path: Path) -> None:
    left = ["onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "openvino/openvino_model.xml",
            "original/params.json", "original/consolidated.00.pth", "pytorch_model.bin",
            "unet/a/w.safetensors"]  # fmt: skip
    write(tmp_path, {"config.json": "{}", "tokenizer.json": "{}", **dict.fromkeys(left, "x")})
    taken = found(tmp_path)
    assert set(taken.sizes) == {"config.json", "tokenizer.json"}
    assert taken.notes == (
        "'base': left out, as it holds weights that are not merged: onnx/ (onnx/model.onnx), openvino/ "
        "(openvino/openvino_model.bin), original/ (original/consolidated.00.pth), pytorch_model.bin, unet/ "
        "(unet/a/w.safetensors)",
    )


def test_a_modules_weights_are_no_reason_to_leave_its_folder_out(tmp_path: Path) -> None:
    files = ("config.json", "tokenizer.json", "2_Dense/config.json", "2_Dense/model.safetensors", "2_Dense/onnx/a.onnx")
    write(tmp_path, dict.fromkeys(files, "x"))
    taken = found(tmp_path, modules=("", "2_Dense"))
    assert set(taken.sizes) == {"config.json", "tokenizer.json", "2_Dense/config.json"}
    assert taken.notes == (
        "'base': left out, as it holds weights that are not merged: 2_Dense/onnx/ (2_Dense/onnx/a.onnx)",
    )


def test_what_is_large_is_refused_by_name_unless_it_is_listed(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": "{}", "tokenizer.json": "{}"})
    sizes = {"a.dat": (64 << 20) + 1, "b.dat": 64 << 20, "c.dat": 63 << 20, "d.dat": 62 << 20, "e.dat": 61 << 20,
             "f.dat": 60 << 20}  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    with pytest.raises(
        CheckpointError, match=r"a\.dat has 64MiB.*\n  b\.dat has 64MiB.*list it under `companions`"
    ) as e:
        found(tmp_path)
    assert "c.dat" not in str(e.value)
    assert set(found(tmp_path, listed=["a.dat", "b.*"]).sizes) == {"config.json", "tokenizer.json", *sizes}


def test_what_is_listed_goes_whatever_it_is_but_for_what_is_merged(tmp_path: Path) -> None:
    files = ("config.json", "tokenizer.json", "onnx/model.onnx", "README.md", "model.safetensors")
    write(tmp_path, dict.fromkeys(files, "x"))
    assert set(found(tmp_path, listed=["onnx/*", "*.safetensors"]).sizes) == {
        "config.json", "tokenizer.json", "onnx/model.onnx",
    }  # fmt: skip
    with pytest.raises(CheckpointError, match=r"`companions: nothing\.\*` fits no file"):
        found(tmp_path, listed=["nothing.*"])


@pytest.mark.parametrize(
    ("files", "missing"),
    [((), "config.json and no tokenizer"), (("config.json",), "tokenizer"), (("vocab.txt",), "config.json")],
)
def test_a_base_without_config_or_tokenizer_is_said(files: Sequence[str], missing: str, tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys((*files, "model.safetensors"), "x"))
    said = f"'base' has no {missing}: the result will not load before that is put beside it"
    assert found(tmp_path).notes == (said,)
    assert found(tmp_path, is_model=False).notes == ()


def test_a_base_that_is_a_file_has_nothing_beside_it(tmp_path: Path) -> None:
    write(tmp_path, {"model.safetensors": "x", "config.json": "{}"})
    taken = found(tmp_path / "model.safetensors")
    assert taken.sizes == {}
    assert "no config.json and no tokenizer" in taken.notes[0]


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["/proc/self/environ", "../key", "../folder"])
def test_a_link_that_leaves_the_folder_is_refused(target: str, tmp_path: Path) -> None:
    write(tmp_path, {"key": "secret", "folder/key": "secret", "base/config.json": "{}"})
    (tmp_path / "base" / "notes.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to .*, outside of its folder"):
        found(tmp_path / "base")


def test_a_file_that_became_a_link_since_it_was_found_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, {"key": "abc", "base/notes.txt": "123"})
    taken = found(tmp_path / "base")
    (tmp_path / "base" / "notes.txt").unlink()
    (tmp_path / "base" / "notes.txt").symlink_to("../key")
    with pytest.raises(CheckpointError, match="outside of its folder"):
        taken.read("notes.txt")


@pytest.mark.parametrize("target", ["nowhere", "notes.txt"])
def test_a_link_to_nothing_is_refused(target: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").symlink_to(target)
    with pytest.raises(
        CheckpointError, match=r"notes\.txt: is a link to what is not there|notes\.txt is a link that leads nowhere"
    ):
        found(tmp_path)


def test_links_inside_the_folder_and_those_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--base" / "snapshots" / "main"
    write(tmp_path, {f"models--org--base/blobs/{'a' * 40}": "{}", f"models--org--base/blobs/{'b' * 64}": "words"})
    write(snapshot, {"own.txt": "own"})
    (snapshot / "config.json").symlink_to(f"../../blobs/{'a' * 40}")
    (snapshot / "vocab.txt").symlink_to(f"../../blobs/{'b' * 64}")
    (snapshot / "again.txt").symlink_to("own.txt")
    taken = found(snapshot)
    assert {name: taken.read(name) for name in taken.sizes} == {
        "config.json": b"{}", "vocab.txt": b"words", "again.txt": b"own", "own.txt": b"own",
    }  # fmt: skip


def test_a_folder_that_is_a_link_and_a_pipe_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"base/config.json": "{}", "base/inside/a.txt": "", "other/a.txt": ""})
    (tmp_path / "base" / "linked").symlink_to("inside")
    (tmp_path / "base" / "away").symlink_to("../other")
    os.mkfifo(tmp_path / "base" / "pipe")
    with pytest.raises(CheckpointError, match="cannot go beside the merged weights") as e:
        found(tmp_path / "base")
    assert all(said in str(e.value) for said in ("linked: is no file", "pipe: is no file", "away is a link to"))


def test_a_file_that_changed_since_is_not_copied_in_part(tmp_path: Path) -> None:
    write(tmp_path, {"notes.txt": "123"})
    taken = found(tmp_path)
    (tmp_path / "notes.txt").write_text("12345")
    with pytest.raises(CheckpointError, match=r"has 5 bytes, 3 when the merge began"):
        list(taken.pieces("notes.txt"))


def test_files_go_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_dist.inputs.companions.PIECE_BYTES", 4)
    write(tmp_path, {"notes.txt": "0123456789", "empty": ""})
    taken = found(tmp_path)
    assert [bytes(piece) for piece in taken.pieces("notes.txt")] == [b"0123", b"4567", b"89"]
    assert taken.read("empty") == b""
