"""What all commands share: help with an example that works, exit codes, JSON, completion, progress, the doctors."""

import argparse
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from kanyun.cli import doctor
from kanyun.cli.parser import Parser
from kanyun.cli.progress import Progress, track
from kanyun.errors import UserError, run_cli
from tests.support.packed_data import random_packs, write_packed
from trainer.config import load_config

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = ("kanyun", "pipeline", "trainer", "convert", "trainer.checkpoint")
LENGTH = 64


def parsers(module: str) -> Iterator[Parser]:
    """The command's parser and those of its subcommands."""
    top = importlib.import_module(f"{module}.__main__").parser()
    yield top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def run(module: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `python -m module arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_cli(importlib.import_module(f"{module}.__main__").main)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("module", MODULES)
def test_every_help_ends_with_an_example_that_is_accepted(module: str) -> None:
    top, *subcommands = parsers(module)
    assert len(subcommands) >= 2
    for parser in (top, *subcommands):
        help = parser.format_help()
        examples = help.partition("\nexample:\n")[2].strip().splitlines()
        assert examples
        for example in examples:
            program, arguments = example.strip().removeprefix("python -m ").split(" ", 1)
            assert program == module
            if "STAGE" not in arguments:
                assert top.parse_args(shlex.split(arguments))


def test_the_script_that_torchrun_starts_has_a_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.main import main

    monkeypatch.setattr(sys, "argv", ["trainer/main.py", "--help"])
    assert main() == 0
    example = re.findall("^example: torchrun .* trainer/main.py (.*)$", capsys.readouterr().out, re.MULTILINE)
    config, *changes = example[0].split()
    assert load_config(str(ROOT / config), changes).output == "runs/7b"


def test_the_launcher_has_a_help_and_refuses_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.launch import check_processes, main, restarts

    monkeypatch.setattr(sys, "argv", ["trainer/launch.py", "--help"])
    assert main() == 0
    example = re.findall("^example: python trainer/launch.py .* -- (.*)$", capsys.readouterr().out, re.MULTILINE)
    config, *changes = example[0].split()
    assert load_config(str(ROOT / config), changes).output == "runs/7b"
    monkeypatch.setattr(sys, "argv", ["trainer/launch.py", config])
    assert main() == 2
    out, said = capsys.readouterr()
    assert (out, "\nusage: " in said) == ("", True)
    check_processes("2")
    for number in ("two", "0"):
        with pytest.raises(UserError, match=rf"NPROC \(--nproc-per-node\) is '{number}': "):
            check_processes(number)
    monkeypatch.setenv("RESTARTS", "some")
    with pytest.raises(UserError, match="RESTARTS is 'some': a number is needed"):
        restarts()


def test_a_layout_is_told_to_a_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.layout import main, parser

    example = parser().format_help().partition("\nexample:\n")[2].split()[3:]
    for arguments in (example, [*example, "--json"]):
        monkeypatch.setattr(sys, "argv", ["layout", *arguments])
        assert main() == 0
    table, _, answer = capsys.readouterr().out.rpartition("\n[")
    first = json.loads(f"[{answer}")[0]
    assert f" {first['tokens_per_second']:,.0f} " in table
    assert f" {first['memory'] / 1e9:.1f} " in table


@pytest.mark.parametrize("script", PROJECT["scripts"])
def test_console_scripts_lead_to_a_command(script: str) -> None:
    module, _, function = PROJECT["scripts"][script].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("module", ["kanyun", "pipeline", "trainer", "convert"])
def test_version_is_that_of_the_project(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(module, monkeypatch, "--version") == 0
    assert capsys.readouterr().out.split()[1] == version("kanyun") == PROJECT["version"]


def test_bash_completes_commands_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pipeline", monkeypatch, "--print-completion", "bash") == 0
    script = capsys.readouterr().out
    ask = 'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _shtab_kanyun_pipeline; echo "${COMPREPLY[@]}"'
    asked = f"{script}\nCOMP_WORDS=(kanyun-pipeline prep); {ask}\nCOMP_WORDS=(kanyun-pipeline pack --vis); {ask}"
    done = subprocess.run(["bash"], input=asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["preprocess", "--vision-budget"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such folder: a\nb\x1b[31m"), 2),
        (ModuleNotFoundError("No module named 'jinja2'", name="jinja2.sandbox"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_are_one_line_on_stderr(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == code
    out, said = capsys.readouterr()
    assert (out, said.count("\n"), said[:7]) == ("", 1, "error: ")


def test_a_reader_that_went_away_is_no_error() -> None:
    """What `kanyun info ... | head` does, where the output is larger than a pipe."""
    code = "from kanyun.errors import run_cli\nrun_cli(lambda: print('x' * 10**6))"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("x141\n", "")


def test_output_that_its_disk_refuses_is_one_sentence() -> None:
    """And where the errors go to the same full disk, the exit code says it."""
    code = "from kanyun.errors import run_cli\nrun_cli(lambda: print('x'))"
    for errors, lines in (("", 1), ("2>&1", 0)):
        command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} >/dev/full {errors}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr.count("\n")) == (2, lines)
        assert not lines or done.stderr.startswith("error: a disk is full, perhaps that of the output ([Errno 28]")


@pytest.mark.parametrize("module", MODULES)
def test_wrong_arguments_end_with_2(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(module, monkeypatch, "no-such-command") == 2
    out, said = capsys.readouterr()
    assert out == ""
    assert "no-such-command" in said


# --- kanyun info and verify


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Two epochs of one part, 5 and 7 packs."""
    for epoch, packs in ((0, 5), (1, 7)):
        write_packed(tmp_path, random_packs(epoch, packs, LENGTH, images=False), LENGTH, epoch=epoch)
    return tmp_path


def test_info_shows_parts_and_epochs_as_a_table(
    parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("kanyun", monkeypatch, "info", str(parent)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    rows = [re.split(r"  +", line) for line in lines]
    columns = [dict(zip(rows[0], row, strict=False)) for row in rows[1:3]]
    assert [(row["epoch"], row["packs"]) for row in columns] == [("0", "5"), ("1", "7")]
    assert rows[3][:2] == ["2 datasets", "12"]
    assert run("kanyun", monkeypatch, "info", str(parent), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["content digest"] for row in columns] == [value["content_digest"][:12] for value in values]
    assert [value["packs"] for value in values] == [5, 7]


def test_verify_answers_a_script(
    parent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("kanyun", monkeypatch, "verify", str(parent), "--json") == 0
    assert list(json.loads(capsys.readouterr().out).values()) == [[], []]
    shard = next(parent.glob("*epoch_1*/shard-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run("kanyun", monkeypatch, "verify", str(parent), "--json") == 1
    sound, damaged = json.loads(capsys.readouterr().out).values()
    assert sound == []
    assert shard.name in damaged[0]


# --- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_progress_has_rate_and_time_left() -> None:
    progress = Progress("copying", 4_000_000_000, "B")
    progress.advance(1_000_000_000)
    assert progress.line(10.0) == "copying: 25%, 1.00 GB of 4.00 GB, 100.0 MB/s, ETA 0:00:30"
    progress = Progress("verify", 1200, "batches")
    assert progress.line(10.0) == "verify: 0%, 0 of 1,200 batches, 0.0 batches/min, ETA unknown"
    progress.advance(3)
    assert progress.line(60.0) == "verify: 0%, 3 of 1,200 batches, 3.0 batches/min, ETA 6:39:00"
    assert Progress("pack", 0, "tasks").line(61.5) == "pack: 0:01:01 so far"


@pytest.mark.parametrize(("out", "begin", "end"), [(io.StringIO(), "", "\n"), (Terminal(), "\r\033[K", "")])
def test_progress_is_a_line_in_a_log_and_redrawn_on_a_terminal(out: io.StringIO, begin: str, end: str) -> None:
    with Progress("verify", 4000, "batches", every=0.01, out=out) as progress:
        progress.advance(2000)
        while out.getvalue().count("50%") < 2:
            time.sleep(0.005)
    first = re.escape(begin) + r"verify: 50%, 2,000 of 4,000 batches, [\d,.]+ batches/s, ETA 0:\d\d:\d\d" + end
    assert re.match(f"({first}){{2}}", out.getvalue())
    assert out.getvalue().endswith("\r\033[K" if begin else "\n")


def test_what_ends_at_once_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track([1, 2], "reading", "tensors")) == [1, 2]
    assert capsys.readouterr().err == ""


# --- doctor


def test_java_is_looked_for_where_spark_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert doctor.java().state == "missing"
    assert "JAVA_HOME" in doctor.java().sentence
    for release, state in (("11.0.2", "missing"), ("17.0.9", "ok"), ("21.0.1", "ok"), ("22", "missing")):
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{release}\" 2024-01-01' >&2\n")
        java.chmod(0o755)
        assert (doctor.java().state, release.split(".")[0] in doctor.java().sentence) == (state, True)
    monkeypatch.delenv("JAVA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.java().sentence == (
        "there is no java in PATH: install Java 17 or 21 (Debian: apt-get install default-jre-headless)"
    )


def test_hadoop_settings_disk_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    assert doctor.hadoop_conf().state == "unused"
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    (tmp_path / "core-site.xml").touch()
    assert "has no hdfs-site.xml: " in doctor.hadoop_conf().sentence
    (tmp_path / "hdfs-site.xml").touch()
    assert doctor.hadoop_conf().state == "ok"
    assert doctor.reachable(str(tmp_path)).sentence == "2 names in it"
    assert doctor.reachable(str(tmp_path / "raw")).state == "missing"
    monkeypatch.setattr(doctor, "LEAST_DISK", 1e18)
    assert re.search(r"GB free, less than 1000000000 GB: make room", doctor.disk("disk", str(tmp_path / "a")).sentence)


@pytest.mark.parametrize(
    ("module", "extras"), [("pipeline.doctor", ["pipeline"]), ("trainer.cli.doctor", ["trainer", "convert"])]
)
def test_a_doctor_looks_for_every_package_that_pip_brings(module: str, extras: list[str]) -> None:
    brought = {name for extra in extras for name in PROJECT["optional-dependencies"][extra]}
    assert set(importlib.import_module(module)._PACKAGES) == brought - {"kanyun[trainer]"}


def test_a_doctor_says_what_is_missing_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert run("pipeline", monkeypatch, "doctor", str(tmp_path / "raw"), "--json") == 1
    found = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert [name for name, finding in found.items() if finding["state"] == "missing"] == ["Java", str(tmp_path / "raw")]
    assert "Spark" not in found, "it cannot start without Java"
    assert run("trainer", monkeypatch, "doctor", str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if " GPU " in line).startswith("unused")
    assert all(re.match(r"(ok|unused) +\S", line) for line in lines)
