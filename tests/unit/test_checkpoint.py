"""Checkpoints of a model: what comes back, what a crash leaves behind, what is refused."""

import io
import json
import os
import pickle
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kanyun.errors import UserError
from kanyun.storage import Folder
from tests.support.checkpoints import names
from tests.support.odd_folders import forget_digests
from tests.support.qwen_assets import tiny_text_folder
from trainer import checkpoint
from trainer.checkpoint import State, saver, together, writer
from trainer.checkpoint.faults import faults
from trainer.checkpoint.listing import list_steps
from trainer.checkpoint.metadata import encode_metadata, read_metadata
from trainer.checkpoint.reader import load
from trainer.checkpoint.saver import Saver, save
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.language import LanguageModel
from trainer.runtime import Runtime

EMBEDDING = "language.embedding.word_embeddings.weight"


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


def test_a_save_beside_training_is_of_the_moment_it_began_and_there_is_one_at_a_time(
    output: Folder, model: LanguageModel, hf: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.make()
    may_write, write = threading.Event(), together.write_parts
    monkeypatch.setattr(together, "write_parts", lambda *arguments: may_write.wait(60) and write(*arguments))
    beside, embedding = Saver(output, Folder(str(hf)), keep_last=2), model.get_parameter(EMBEDDING)
    assert beside.prepare(model, None, runtime.device) == []
    first = embedding.detach().clone()
    beside.start(state(model, 1), model, None)
    assert beside.in_flight  # while training goes on:
    with torch.no_grad():
        embedding.add_(1)
    next_save = threading.Thread(target=beside.start, args=(state(model, 2), model, None))
    next_save.start()
    next_save.join(0.1)
    assert next_save.is_alive()
    assert names(output) == [".attempt-step_00000001"]
    may_write.set()
    next_save.join()
    beside.finish()
    beside.close()
    for name, values in (("step_00000001", first), ("step_00000002", first + 1)):
        load(checkpoint.checkpoints_of(output) / name, model)
        assert torch.equal(embedding, values)


def test_without_room_for_a_copy_training_waits_for_the_disk_and_says_so(
    output: Folder, model: LanguageModel, hf: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    output.make()
    monkeypatch.setattr(saver, "host_room", lambda ranks: 100_000)
    waiting = Saver(output, Folder(str(hf)))
    (sentence,) = waiting.prepare(model, None, runtime.device)
    assert re.fullmatch(
        r"host memory has 0\.1 MB free a rank, a copy for saves beside training needs \d\.\d MB: training waits "
        "while a checkpoint is written",
        sentence,
    )
    waiting.start(state(model, 1), model, None)
    assert not waiting.in_flight
    assert names(output) == ["latest", "step_00000001"]


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


def crash_at(at: str, patch: pytest.MonkeyPatch) -> None:
    """Let the process die, as far as its writing thread can, where a file is created or a folder renamed."""
    create, write = writer._new_file, Folder.write

    def crash(*args: Any) -> Any:
        raise KeyboardInterrupt(at)

    patch.setattr(writer, "_new_file", lambda folder, name: crash() if name == at else create(folder, name))
    patch.setattr(Folder, "write", lambda folder, name, data: crash() if name == at else write(folder, name, data))
    if at == "move_to":
        patch.setattr(Folder, at, crash)


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
    forget_digests(Path(written.path))
    metadata = Path(written.path, ".metadata")
    original = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil(tmp_path / "run by metadata")))
    with pytest.raises(UserError, match=r"no checkpoint of plain data .*mkdir"):
        load(written, model)

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
        load(written, model)
    assert "no checkpoint of plain data" in faults(written)[0]
    assert not list(tmp_path.glob("run by*"))
