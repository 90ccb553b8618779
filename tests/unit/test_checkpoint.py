"""Checkpoints: what comes back, what a crash leaves behind, what is refused."""

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kanyun.errors import UserError
from kanyun.storage import Folder
from kanyun.storage.local import LocalBackend
from tests.support.qwen_assets import tiny_text_folder
from trainer import checkpoint
from trainer.checkpoint import State, writer
from trainer.checkpoint.faults import faults
from trainer.checkpoint.listing import list_steps
from trainer.checkpoint.metadata import encode_metadata, read_metadata, refuse_code
from trainer.checkpoint.reader import load
from trainer.checkpoint.saver import save
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.language import LanguageModel
from trainer.runtime import Runtime


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    with Runtime.start() as runtime:
        yield runtime


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(hf: Path, runtime: Runtime) -> LanguageModel:
    return build_model(ModelConfig.from_hf(str(hf)), runtime)


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "out"))


def state(model: LanguageModel, step: int = 0) -> State:
    return State(step, 4 * step, 0, "tokenizer", asdict(model.model_config), {"seed": 1, "length": 64})


def names(output: Folder) -> list[str]:
    return checkpoint.checkpoints_of(output).names()


def test_weights_and_files_come_back(output: Folder, model: LanguageModel, hf: Path, runtime: Runtime) -> None:
    written = save(output, state(model, 7), model, None, Folder(str(hf)))
    assert written.name == "step_00000007"
    # The folder of the Hugging Face model, byte for byte, without its weights.
    assert (written / "hf").read("tokenizer.json") == (hf / "tokenizer.json").read_bytes()
    assert (written / "hf").read("config.json") == (hf / "config.json").read_bytes()
    assert "model.safetensors" not in (written / "hf").names()
    found = checkpoint.read_state(written)
    assert (found.step, found.consumed) == (7, 28)
    found.require(state(model), "here")  # tuples became lists in JSON: still the same model

    other = build_model(model.model_config, replace(runtime, seed=9))
    assert not torch.equal(other.get_parameter(EMBEDDING), model.get_parameter(EMBEDDING))
    load(written, other)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


EMBEDDING = "language.embedding.word_embeddings.weight"


def test_resolve_takes_a_run_its_checkpoints_or_a_step(output: Folder, model: LanguageModel, hf: Path) -> None:
    assert checkpoint.latest(output) is None
    with pytest.raises(UserError, match="is no checkpoint: give a run's output folder"):
        checkpoint.resolve(output.path)
    for step in (3, 12):
        save(output, state(model, step), model, None, Folder(str(hf)), keep_last=2)
    root = f"{output.path}/checkpoints"
    for given in (output.path, output.uri, root, f"{root}/", f"{root}/step_00000012"):
        assert checkpoint.resolve(given).name == "step_00000012", given
    assert checkpoint.resolve(f"{root}/step_00000003").name == "step_00000003"


def test_keeps_the_last_ones_and_deletes_nothing_newer(output: Folder, model: LanguageModel, hf: Path) -> None:
    for step in (90, 1, 2, 3):
        save(output, state(model, step), model, None, Folder(str(hf)), keep_last=2)
    assert names(output) == ["latest", "step_00000002", "step_00000003", "step_00000090"]
    save(output, state(model, 3), model, None, Folder(str(hf)), keep_last=1)  # a second time: replaced
    assert names(output) == ["latest", "step_00000003", "step_00000090"]
    assert "step_00000090: newer than step 3, moved to" in checkpoint.set_aside(output, 3)
    assert checkpoint.resolve(output.path).name == "step_00000003"
    (aside,) = [name for name in names(output) if name.startswith("aside-")]
    assert checkpoint.resolve(f"{output.path}/checkpoints/{aside}/step_00000090").name == "step_00000090"
    assert checkpoint.set_aside(output, 3) == ""


@pytest.mark.parametrize("at", ["__0_0.distcp", ".metadata", "state.json", "move_to", "latest"])
def test_a_crash_at_any_point_leaves_the_one_before(
    at: str, output: Folder, model: LanguageModel, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(output, state(model, 1), model, None, Folder(str(hf)))
    with monkeypatch.context() as patch:
        crash_at(at, patch)
        with pytest.raises(KeyboardInterrupt, match=at):
            save(output, state(model, 2), model, None, Folder(str(hf)))
    last = "step_00000002" if at == "latest" else "step_00000001"  # found by looking
    assert checkpoint.resolve(output.path).name == last
    load(checkpoint.resolve(output.path), model)

    save(output, state(model, 3), model, None, Folder(str(hf)))
    assert names(output) == ["latest", "step_00000003"]  # nothing is left of the attempt


def test_hidden_folders_of_others_stay(output: Folder, model: LanguageModel, hf: Path) -> None:
    save(output, state(model, 1), model, None, Folder(str(hf)))
    root = Path(output.path, "checkpoints")
    for name in (".best/step_00000001", ".snapshot", ".attempt-step_00000002", ".removed-step_00000001", ".attempt"):
        (root / name).mkdir(parents=True)
    for name in (".latest.tmp", ".nfs000000000001"):
        (root / name).write_text("step")
    save(output, state(model, 2), model, None, Folder(str(hf)))
    assert names(output) == [".attempt", ".best", ".nfs000000000001", ".snapshot", "latest", "step_00000002"]
    assert (root / ".best/step_00000001").is_dir()


def test_checkpoints_may_link_to_a_larger_disk(
    output: Folder, model: LanguageModel, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    output.make()
    Path(output.path, "checkpoints").symlink_to(larger)
    disk_usage = shutil.disk_usage

    def usage(path: str) -> Any:
        inside = Path(path).resolve().is_relative_to(larger)
        return disk_usage(path)._replace(free=10**9 if inside else 1000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert save(output, state(model, 1), model, None, Folder(str(hf))).exists()


@pytest.mark.parametrize("name", [".metadata", "state.json", "latest"])
def test_a_disk_that_gets_full_in_a_small_file(
    name: str, output: Folder, model: LanguageModel, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last files of a checkpoint, one sentence says what is free and needed; the hint is not worth one."""
    create, disk_usage = LocalBackend.create, shutil.disk_usage

    def full(backend: LocalBackend, path: str) -> Any:
        if path.endswith(f".{name}.tmp"):
            monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=5000))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return create(backend, path)

    monkeypatch.setattr(LocalBackend, "create", full)
    if name == "latest":
        assert save(output, state(model, 1), model, None, Folder(str(hf))).exists()
        return
    with pytest.raises(UserError, match=r"/out/checkpoints has 0\.0 MB free, \d\.\d MB are needed: make room there"):
        save(output, state(model, 1), model, None, Folder(str(hf)))
    assert names(output) == []


def test_a_quota_or_inodes_that_are_used_up(
    output: Folder, model: LanguageModel, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the disk has room, and making more would help nobody."""

    def full(backend: LocalBackend, path: str) -> Any:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), path)

    monkeypatch.setattr(LocalBackend, "create", full)
    sentence = r"free, \d\.\d MB are needed \(Disk quota exceeded\): see to your quota, and to inodes \(df -i\)"
    with pytest.raises(UserError, match=sentence):
        save(output, state(model, 1), model, None, Folder(str(hf)))


@pytest.mark.parametrize("change", [{"size": "many"}, {"size": -1}, {"size": True}, {"xxh3": 5}, {"xxh3": None}])
def test_a_state_with_files_of_other_values_is_damaged(
    change: dict[str, Any], output: Folder, model: LanguageModel, hf: Path
) -> None:
    """By hand, as its own digest is left out."""
    step = save(output, state(model, 1), model, None, Folder(str(hf)))
    values = json.loads(step.read("state.json"))
    del values["digest"]
    values["files"]["__0_0.distcp"] |= change
    step.write("state.json", json.dumps(values).encode())
    (listed,) = list_steps(output.path)
    assert "state.json is damaged (a file is {" in listed.fault
    assert [sentence == listed.fault for sentence in faults(step)] == [True]


def crash_at(at: str, patch: pytest.MonkeyPatch) -> None:
    """Let the process die, as far as its writing thread can, where a file is created or a folder renamed."""
    create, write = writer._new_file, Folder.write

    def crash(*args: Any) -> Any:
        raise KeyboardInterrupt(at)

    patch.setattr(writer, "_new_file", lambda folder, name: crash() if name == at else create(folder, name))
    patch.setattr(Folder, "write", lambda folder, name, data: crash() if name == at else write(folder, name, data))
    if at == "move_to":
        patch.setattr(Folder, at, crash)


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"consumed": -1}, {"skipped": True}, {"model": []}, {"run": None}, {"schedule": {"steps": 2}}],
)
def test_a_state_of_other_values_is_damaged(change: Any, output: Folder, model: LanguageModel, hf: Path) -> None:
    written = save(output, state(model, 2), model, None, Folder(str(hf)))
    values = json.loads(written.read("state.json"))
    del values["digest"]  # as in checkpoints from before it had one
    written.write("state.json", json.dumps(values | change).encode())
    with pytest.raises(UserError, match=rf"state.json is damaged \({next(iter(change))} is "):
        checkpoint.require_whole(written)
    written.write("state.json", json.dumps({"step": 3}).encode())
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.read_state(written)


def test_a_file_in_place_of_a_step_is_listed_as_one_that_is_not_whole(
    output: Folder, model: LanguageModel, hf: Path
) -> None:
    save(output, state(model, 1), model, None, Folder(str(hf)))
    Path(checkpoint.checkpoints_of(output).path, "step_00000002").write_text("")
    whole, other = list_steps(output.path)
    assert (whole.fault, whole.size > 0) == ("", True)
    assert "step_00000002" in other.fault


def test_a_step_under_another_name_is_passed_over(output: Folder, model: LanguageModel, hf: Path) -> None:
    for step in (1, 2):
        save(output, state(model, step), model, None, Folder(str(hf)), keep_last=2)
    root = output / "checkpoints"
    (root / "step_00000002").move_to(root / "step_00000009")
    search = checkpoint.find(output)
    assert search.newest is not None
    assert search.newest.name == "step_00000001"
    assert "step_00000009 holds step 2, by its state.json: give it its name again" in search.passed_over[0]


def test_latest_is_a_hint_that_may_be_a_folder(output: Folder, model: LanguageModel, hf: Path) -> None:
    """As a copy that follows links makes of a link to the newest step. It may be the only copy: it stays."""
    save(output, state(model, 1), model, None, Folder(str(hf)))
    (output / "checkpoints").delete("latest")
    (output / "checkpoints" / "latest").write("state.json", b"{}")
    (sentence,) = checkpoint.find(output).sentences
    assert "latest is no file that can be read; step_00000001 is the newest whole checkpoint" in sentence
    save(output, state(model, 2), model, None, Folder(str(hf)), keep_last=2)
    assert checkpoint.resolve(output.path).name == "step_00000002"
    assert (output / "checkpoints" / "latest").names() == ["state.json"]


def test_whole_ones_are_found_by_looking(output: Folder, model: LanguageModel, hf: Path) -> None:
    for step in (1, 2, 3, 4):
        save(output, state(model, step), model, None, Folder(str(hf)), keep_last=4)
    root = Path(output.path, "checkpoints")
    assert checkpoint.find(output).sentences == []
    for hint, problem in ((None, "is missing"), ("", "names ''"), ("step_00000009", "names 'step_00000009'")):
        (root / "latest").unlink() if hint is None else (root / "latest").write_text(hint)
        search = checkpoint.find(output)
        assert search.newest is not None
        assert search.newest.name == "step_00000004"
        assert [problem in sentence for sentence in search.sentences] == [True], hint
    (root / "step_00000004" / "state.json").unlink()
    short = root / "step_00000003" / "__0_2.distcp"
    short.write_bytes(short.read_bytes()[:-7])
    (root / "step_00000002" / ".metadata").unlink()
    search = checkpoint.find(output)
    assert search.newest is not None
    assert search.newest.name == "step_00000001"
    for sentence, fault in zip(
        search.passed_over, ("has no state.json", "bytes instead of", "is missing"), strict=True
    ):
        assert sentence.startswith("passed over step_0000000")
        assert fault in sentence


def test_a_flipped_byte_of_any_file_is_named(output: Folder, model: LanguageModel, hf: Path) -> None:
    written = save(output, state(model, 5), model, None, Folder(str(hf)))
    assert faults(written) == []
    for name, size in written.files():
        path = Path(written.path, name)
        data = path.read_bytes()
        path.write_bytes(data[: size // 2] + bytes([data[size // 2] ^ 4]) + data[size // 2 + 1 :])
        with pytest.raises(UserError, match=rf"step_00000005/{name} is damaged"):
            load(written, model)
        (fault,) = faults(written)
        assert f"step_00000005/{name} is damaged" in fault
        path.write_bytes(data)
    load(written, model)


def test_one_without_digests_loads_and_says_so(
    output: Folder, model: LanguageModel, hf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they were written before: state.json without files and digest."""
    written = save(output, state(model, 5), model, None, Folder(str(hf)))
    values = json.loads(written.read("state.json"))
    old = ("step", "consumed", "skipped", "fingerprint", "model", "run")
    written.write("state.json", json.dumps({name: values[name] for name in old}).encode())
    assert checkpoint.resolve(output.path).name == written.name
    load(written, model)
    assert "no digest recorded" in capsys.readouterr().out
    assert [listed.line().split("GB  ")[1] for listed in list_steps(output.path)] == ["whole, no digest recorded"]
    path = Path(written.path, "__0_0.distcp")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="instead of"):
        checkpoint.resolve(output.path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    value: float, output: Folder, model: LanguageModel, hf: Path, runtime: Runtime
) -> None:
    bad = build_model(model.model_config, runtime)
    bad.get_parameter(EMBEDDING).data[3, 1] = value
    written = save(output, state(model, 5), bad, None, Folder(str(hf)))
    with pytest.raises(UserError, match=rf"{EMBEDDING} has 1 of .* NaN or infinite"):
        load(written, bad)
    (fault,) = faults(written)
    assert EMBEDDING in fault


def test_going_on_as_another_training_is_refused(model: LanguageModel) -> None:
    ours = state(model)
    ours.require(ours, "here")
    changed = [
        (replace(ours, fingerprint="other"), "tokenizer fingerprint tokenizer, this run has other"),
        (replace(ours, run={"seed": 2, "length": 64}), "seed 1, this run has 2"),
        (replace(ours, model=ours.model | {"num_layers": 9}), "num_layers 2, this run has 9"),
    ]
    for other, message in changed:
        with pytest.raises(UserError, match=f"^there was made with {message}"):
            ours.require(other, "there")
    # A converted model was trained on nothing: any run may begin with it.
    replace(ours, run={}).require(replace(ours, run={"seed": 5}), "here")


def test_another_model_does_not_load(output: Folder, model: LanguageModel, hf: Path, runtime: Runtime) -> None:
    written = save(output, state(model), model, None, Folder(str(hf)))
    others: list[dict[str, Any]] = [{"num_layers": 3}, {"intermediate_size": 256}]
    for other in others:
        with pytest.raises(UserError, match="does not hold this model"):
            load(written, build_model(replace(model.model_config, **other), runtime))
    Path(written.path, "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="step_00000000"):
        load(written, model)


class Evil:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(output: Folder, model: LanguageModel, hf: Path, tmp_path: Path) -> None:
    """torch's .metadata is a pickle, and so are the values beside the tensors."""
    written = save(output, state(model), model, None, Folder(str(hf)))
    metadata = Path(written.path, ".metadata")
    original = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil(tmp_path / "run by metadata")))
    with pytest.raises(UserError, match=r"no checkpoint of plain data .*mkdir"):
        refuse_code(written)

    evil = io.BytesIO()
    torch.save([Evil(tmp_path / "run by values")], evil)
    metadata.write_bytes(original)
    records = [
        replace(record, file="evil.distcp", offset=0, size=len(evil.getvalue())) if record.shape is None else record
        for record in read_metadata(written)
    ]
    Path(written.path, "evil.distcp").write_bytes(evil.getvalue())
    metadata.write_bytes(encode_metadata(records))
    with pytest.raises(UserError, match="no checkpoint of plain data"):
        refuse_code(written)
    assert not list(tmp_path.glob("run by*"))
