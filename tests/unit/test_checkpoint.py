"""Checkpoints: what comes back, what a crash leaves behind, what is refused."""

import io
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kanyun.errors import UserError
from kanyun.storage import Folder
from tests.support.qwen_assets import tiny_text_folder
from trainer import checkpoint
from trainer.checkpoint import State
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
    written = checkpoint.save(output, state(model, 7), model, None, Folder(str(hf)))
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
    checkpoint.load(written, other)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


EMBEDDING = "language.embedding.word_embeddings.weight"


def test_resolve_takes_a_run_its_checkpoints_or_a_step(output: Folder, model: LanguageModel, hf: Path) -> None:
    assert checkpoint.latest(output) is None
    with pytest.raises(UserError, match="is no checkpoint: give a run's output folder"):
        checkpoint.resolve(output.path)
    for step in (3, 12):
        checkpoint.save(output, state(model, step), model, None, Folder(str(hf)), keep_last=2)
    root = f"{output.path}/checkpoints"
    for given in (output.path, output.uri, root, f"{root}/", f"{root}/step_00000012"):
        assert checkpoint.resolve(given).name == "step_00000012", given
    assert checkpoint.resolve(f"{root}/step_00000003").name == "step_00000003"


def test_keeps_the_last_ones_and_no_later_one_of_an_abandoned_attempt(
    output: Folder, model: LanguageModel, hf: Path
) -> None:
    checkpoint.save(output, state(model, 90), model, None, Folder(str(hf)))  # killed before it could move `latest`
    for step in (1, 2, 3):
        checkpoint.save(output, state(model, step), model, None, Folder(str(hf)), keep_last=2)
    assert names(output) == ["latest", "step_00000002", "step_00000003"]
    checkpoint.save(output, state(model, 3), model, None, Folder(str(hf)), keep_last=1)  # again: replaced
    assert names(output) == ["latest", "step_00000003"]


@pytest.mark.parametrize("at", ["copy_tokenizer", "state.json", "move_to", "latest"])
def test_a_crash_at_any_point_leaves_the_one_before(
    at: str, output: Folder, model: LanguageModel, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(output, state(model, 1), model, None, Folder(str(hf)))
    original_write = Folder.write

    def crash(*args: Any) -> None:
        raise KeyboardInterrupt(at)

    def write(folder: Folder, name: str, data: bytes) -> None:
        return crash() if name == at else original_write(folder, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", write)
        if at == "copy_tokenizer":
            patch.setattr(checkpoint, at, crash)
        if at == "move_to":
            patch.setattr(Folder, at, crash)
        with pytest.raises(KeyboardInterrupt, match=at):
            checkpoint.save(output, state(model, 2), model, None, Folder(str(hf)))
    assert checkpoint.resolve(output.path).name == "step_00000001"
    checkpoint.load(checkpoint.resolve(output.path), model)

    checkpoint.save(output, state(model, 3), model, None, Folder(str(hf)))
    assert names(output) == ["latest", "step_00000003"]  # nothing is left of the attempt


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
    written = checkpoint.save(output, state(model), model, None, Folder(str(hf)))
    for other in ({"num_layers": 3}, {"intermediate_size": 256}):
        with pytest.raises(UserError, match="does not hold this model"):
            checkpoint.load(written, build_model(replace(model.model_config, **other), runtime))
    Path(written.path, "__0_0.distcp").unlink()
    with pytest.raises(UserError, match="step_00000000"):
        checkpoint.load(written, model)


class Evil:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_cannot_run_code(output: Folder, model: LanguageModel, hf: Path, tmp_path: Path) -> None:
    """torch's .metadata is a pickle, and so are the values beside the tensors."""
    written = checkpoint.save(output, state(model), model, None, Folder(str(hf)))
    metadata = Path(written.path, ".metadata")
    original = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil(tmp_path / "run by metadata")))
    with pytest.raises(UserError, match=r"no checkpoint of plain data .*mkdir"):
        checkpoint.load(written, model)

    evil = io.BytesIO()
    torch.save([Evil(tmp_path / "run by values")], evil)
    plain = checkpoint._PlainMetadata(io.BytesIO(original)).load()
    (index,) = [index for index in plain.storage_data if index.fqn.startswith("common_state")]
    plain.storage_data[index] = replace(
        plain.storage_data[index], relative_path="evil.distcp", offset=0, length=len(evil.getvalue())
    )
    Path(written.path, "evil.distcp").write_bytes(evil.getvalue())
    metadata.write_bytes(pickle.dumps(plain))
    with pytest.raises(UserError, match="no checkpoint of plain data"):
        checkpoint.load(written, model)
    assert not list(tmp_path.glob("run by*"))


def test_a_damaged_state_is_said_so(output: Folder, model: LanguageModel, hf: Path) -> None:
    written = checkpoint.save(output, state(model), model, None, Folder(str(hf)))
    Path(written.path, "state.json").write_text(json.dumps({"step": 3}))
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.read_state(written)
