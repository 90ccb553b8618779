"""Hugging Face folders as they are found: each is loaded as transformers loads it, or refused in one sentence."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from convert.logits import compare
from convert.output import new_folder
from convert.resize_vocab import resize_vocab
from convert.to_hf import to_hf
from convert.to_megatron import to_megatron
from kanyun.errors import UserError
from tests.support.odd_folders import EMBEDDING, HEAD, LOADED, REFUSED, WEIGHTS, forget_digests, tokens_added
from tests.support.qwen_assets import tiny_text_folder, tiny_vl_folder

os.environ["HF_HUB_OFFLINE"] = "1"


def model(folder: Path, kind: str) -> Path:
    if kind == "vision":
        return tiny_vl_folder(folder, tied=False)
    return tiny_text_folder(folder, tied=kind == "tied")


@pytest.mark.parametrize("name", LOADED)
def test_it_is_loaded_as_transformers_loads_it(tmp_path: Path, name: str) -> None:
    kind, edit = LOADED[name]
    source = model(tmp_path / "hf", kind)
    edit(source)
    to_megatron(source, tmp_path / "megatron")
    _, logits = compare(source, tmp_path / "megatron")
    assert logits.first.std() > 0.5
    assert logits.difference.max() <= 1e-4


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    kind, edit, sentence = REFUSED[name]
    source = model(tmp_path / "hf", kind)
    edit(source)
    with pytest.raises(UserError) as refusal:
        to_megatron(source, tmp_path / "megatron")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_all_faults_are_in_one_list(tmp_path: Path) -> None:
    source = model(tmp_path / "hf", "tied")
    for name in ("norm short", "up short", "embedding short", "adapter"):
        REFUSED[name][1](source)
    with pytest.raises(UserError) as refusal:
        to_megatron(source, tmp_path / "megatron")
    assert all(REFUSED[name][2] in str(refusal.value) for name in ("norm short", "up short", "embedding short"))
    assert "lora_A is left over" in str(refusal.value)


def test_a_checkpoint_of_other_shapes_or_with_a_nan_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "hf", "tied")
    to_megatron(source, tmp_path / "megatron")
    settings = tmp_path / "megatron/checkpoints/step_00000000/hf/config.json"
    forget_digests(settings.parents[1])
    text = settings.read_text()
    settings.write_text(text.replace('"intermediate_size": 128', '"intermediate_size":  96'))
    with pytest.raises(UserError, match=r"mlp\.linear_fc1\.weight has shape \[256, 64\], by config.json \[192, 64\]"):
        to_hf(str(tmp_path / "megatron"), tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["tied", "untied", "vision"])
def test_new_embedding_rows_are_the_mean_of_the_old_ones(tmp_path: Path, kind: str) -> None:
    source, out = model(tmp_path / "hf", kind), tmp_path / "resized"
    config = json.loads((source / "config.json").read_text())
    rows = config.get("text_config", config)["vocab_size"]
    with pytest.raises(UserError, match="enough for its last token"):
        resize_vocab(source, out)
    tokens_added(source)
    assert resize_vocab(source, out) == -(-(rows + 1) // 128) * 128 - rows
    old, new = load_file(source / WEIGHTS), load_file(out / WEIGHTS)
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor[: len(old[name])], old[name])
        if name in (EMBEDDING, HEAD):
            assert len(tensor) % 128 == 0
            assert torch.allclose(tensor[rows:], old[name].mean(0), atol=1e-7)
        else:
            assert len(tensor) == len(old[name])
    loader = transformers.AutoModelForImageTextToText if kind == "vision" else transformers.AutoModelForCausalLM
    _, info = loader.from_pretrained(out, output_loading_info=True)
    assert not any(info[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert transformers.AutoTokenizer.from_pretrained(out)(f"<new {rows}>")["input_ids"] == [rows]
    to_megatron(out, tmp_path / "megatron")


def test_attempts_of_killed_conversions_are_removed_and_running_ones_kept(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "hf"
    names = {"killed": "_attempt-out-0123abcd", "running": "_attempt-out-4567abcd", "other": "_attempt-other-0123abcd"}
    for name in names.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / WEIGHTS).write_bytes(b"half")
    running = os.open(tmp_path / names["running"], os.O_RDONLY)
    try:
        fcntl.flock(running, fcntl.LOCK_EX)
        with new_folder(out, source, overwrite=False) as attempt:
            (attempt / "whole").touch()
    finally:
        os.close(running)
    assert sorted(path.name for path in tmp_path.iterdir()) == [names["other"], names["running"], "out"]
    with new_folder(out, source, overwrite=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [names["other"], "out"]
    assert not list(out.iterdir())


def test_an_attempt_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unreadable, opened = tmp_path / "_attempt-out-0123abcd", os.open
    unreadable.mkdir()

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == unreadable:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with new_folder(tmp_path / "out", tmp_path / "hf", overwrite=False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [unreadable.name, "out"]


def test_what_a_killed_conversion_was_about_to_replace_comes_back(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "hf"
    for name in ("_attempt-out-0123abcd", "_attempt-out-0123abcd-replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(UserError, match="out exists"), new_folder(out, source, overwrite=False):
        pass
    assert [path.name for path in out.iterdir()] == ["_attempt-out-0123abcd-replaced"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_process_wrote_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    """Another conversion; or a run, whose checkpoints stay even if the folder was to be replaced."""
    out = tmp_path / "out"
    name = "run.json" if overwrite else "config.json"
    with pytest.raises(UserError, match="out "), new_folder(out, tmp_path / "hf", overwrite) as attempt:
        (attempt / "mine").touch()
        out.mkdir()
        (out / name).touch()
    assert [path.name for path in out.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_as_output_stays_one(tmp_path: Path, exists: bool) -> None:
    link, out = tmp_path / "link", tmp_path / "disk" / "out"
    (out if exists else out.parent).mkdir(parents=True)
    link.symlink_to(out)
    for overwrite in (False, True):
        with new_folder(link, tmp_path / "hf", overwrite) as attempt:
            assert attempt.parent == out.parent  # on its disk
            (attempt / "mine").touch()
        assert link.is_symlink()
        assert [path.name for path in out.iterdir()] == ["mine"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_an_output_that_cannot_be_renamed_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is a mount point"), new_folder(Path("/proc"), tmp_path, overwrite=True):
        pass
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    with (
        pytest.raises(UserError, match="holds the folder you are in"),
        new_folder(tmp_path / "out", tmp_path / "hf", overwrite=False),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_error_names_the_output_and_not_the_attempt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^no room in {tmp_path}/out/x$"):  # noqa: SIM117
        with new_folder(tmp_path / "out", tmp_path / "hf", overwrite=False) as attempt:
            raise UserError(f"no room in {attempt}/x")
