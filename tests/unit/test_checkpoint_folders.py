"""The folders of a run's checkpoints: which are found, which stay, what state.json must say."""

import json
from pathlib import Path
from typing import Any

import pytest

from kanyun.errors import UserError
from kanyun.storage import Folder
from tests.support.checkpoints import names, write_step
from tests.support.training_job import flip_a_byte
from trainer import checkpoint
from trainer.checkpoint.__main__ import parser
from trainer.checkpoint.faults import faults
from trainer.checkpoint.listing import list_steps


@pytest.fixture
def output(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "out"))


def test_resolve_takes_a_run_its_checkpoints_or_a_step(output: Folder) -> None:
    assert checkpoint.latest(output) is None
    with pytest.raises(UserError, match="is no checkpoint: give a run's output folder"):
        checkpoint.resolve(output.path)
    for step in (3, 12):
        write_step(output, step, keep_last=2)
    root = f"{output.path}/checkpoints"
    for given in (output.path, output.uri, root, f"{root}/", f"{root}/step_00000012"):
        assert checkpoint.resolve(given).name == "step_00000012", given
    assert checkpoint.resolve(f"{root}/step_00000003").name == "step_00000003"


def test_keeps_the_last_ones_and_deletes_nothing_newer(output: Folder) -> None:
    for step in (90, 1, 2, 3):
        write_step(output, step, keep_last=2)
    assert names(output) == ["latest", "step_00000002", "step_00000003", "step_00000090"]
    write_step(output, 3, keep_last=1)  # a second time: replaced
    assert names(output) == ["latest", "step_00000003", "step_00000090"]
    assert "step_00000090: newer than step 3, moved to" in checkpoint.set_aside(output, 3)
    assert checkpoint.resolve(output.path).name == "step_00000003"
    (aside,) = [name for name in names(output) if name.startswith("aside-")]
    assert checkpoint.resolve(f"{output.path}/checkpoints/{aside}/step_00000090").name == "step_00000090"
    assert checkpoint.set_aside(output, 3) == ""


def test_hidden_folders_of_others_stay(output: Folder) -> None:
    write_step(output, 1)
    root = Path(output.path, "checkpoints")
    for name in (".best/step_00000001", ".snapshot", ".attempt-step_00000002", ".removed-step_00000001", ".attempt"):
        (root / name).mkdir(parents=True)
    for name in (".latest.tmp", ".nfs000000000001"):
        (root / name).write_text("step")
    write_step(output, 2)
    assert names(output) == [".attempt", ".best", ".nfs000000000001", ".snapshot", "latest", "step_00000002"]
    assert (root / ".best/step_00000001").is_dir()


@pytest.mark.parametrize("change", [{"size": "many"}, {"size": -1}, {"size": True}, {"xxh3": 5}, {"xxh3": None}])
def test_a_state_with_files_of_other_values_is_damaged(change: dict[str, Any], output: Folder) -> None:
    """By hand, as its own digest is left out."""
    step = write_step(output, 1)
    values = json.loads(step.read("state.json"))
    del values["digest"]
    values["files"]["__0_0.distcp"] |= change
    step.write("state.json", json.dumps(values).encode())
    (listed,) = list_steps(output.path)
    assert "state.json is damaged (a file is {" in listed.fault
    assert [sentence == listed.fault for sentence in faults(step)] == [True]


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"consumed": -1}, {"skipped": True}, {"model": []}, {"run": None}, {"schedule": {"steps": 2}}],
)
def test_a_state_of_other_values_is_damaged(change: Any, output: Folder) -> None:
    written = write_step(output, 2)
    values = json.loads(written.read("state.json"))
    del values["digest"]  # as in checkpoints from before it had one
    written.write("state.json", json.dumps(values | change).encode())
    with pytest.raises(UserError, match=rf"state.json is damaged \({next(iter(change))} is "):
        checkpoint.require_whole(written)
    written.write("state.json", json.dumps({"step": 3}).encode())
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        checkpoint.read_state(written)


def test_a_file_in_place_of_a_step_is_listed_as_one_that_is_not_whole(output: Folder) -> None:
    write_step(output, 1)
    Path(checkpoint.checkpoints_of(output).path, "step_00000002").write_text("")
    whole, other = list_steps(output.path)
    assert (whole.fault, whole.size > 0) == ("", True)
    assert "step_00000002" in other.fault


def test_a_step_under_another_name_is_passed_over(output: Folder) -> None:
    for step in (1, 2):
        write_step(output, step, keep_last=2)
    root = output / "checkpoints"
    (root / "step_00000002").move_to(root / "step_00000009")
    search = checkpoint.find(output)
    assert search.newest is not None
    assert search.newest.name == "step_00000001"
    assert "step_00000009 holds step 2, by its state.json: give it its name again" in search.passed_over[0]


def test_latest_is_a_hint_that_may_be_a_folder(output: Folder) -> None:
    """As a copy that follows links makes of a link to the newest step. It may be the only copy: it stays."""
    write_step(output, 1)
    (output / "checkpoints").delete("latest")
    (output / "checkpoints" / "latest").write("state.json", b"{}")
    (sentence,) = checkpoint.find(output).sentences
    assert "latest is no file that can be read; step_00000001 is the newest whole checkpoint" in sentence
    write_step(output, 2, keep_last=2)
    assert checkpoint.resolve(output.path).name == "step_00000002"
    assert (output / "checkpoints" / "latest").names() == ["state.json"]


def test_whole_ones_are_found_by_looking(output: Folder) -> None:
    for step in (1, 2, 3, 4):
        write_step(output, step, keep_last=4)
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


def test_verify_ends_with_1_and_names_the_file(output: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    step = write_step(output, 1)
    for arguments in (["verify", output.path], ["verify", "--json", step.path]):
        args = parser().parse_args(arguments)
        assert args.do(args) == 0
        flip_a_byte(Path(step.path, "__0_0.distcp"))
        assert args.do(args) == 1
        flip_a_byte(Path(step.path, "__0_0.distcp"))
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {step.uri}/__0_0.distcp is damaged: its digest is ")
    right, damaged = said.out.split("}\n{")
    assert json.loads(right + "}") == {"step_00000001": []}
    assert "is damaged" in json.loads("{" + damaged)["step_00000001"][0]
