"""The doctor commands: a machine is looked at before a job is, and each thing that is missing is said in a sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kanyun.errors import UserError
from kanyun.storage import Folder

PYTHONS = ((3, 12), (3, 13))
JAVAS = (17, 21)
LEAST_DISK = 20e9  # bytes: a shuffle of rows without images, or a few checkpoints of a small model


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `state`: ok, missing (something fails without it), or unused (nothing needs it)."""

    name: str
    state: str
    sentence: str


def ok(name: str, sentence: str) -> Finding:
    return Finding(name, "ok", sentence)


def missing(name: str, sentence: str) -> Finding:
    return Finding(name, "missing", sentence)


def unused(name: str, sentence: str) -> Finding:
    return Finding(name, "unused", sentence)


def report(findings: Iterable[Finding], as_json: bool) -> int:
    """Print the findings, each as soon as it is there. Return the exit code: 1 if something is missing."""
    reported = []
    for finding in findings:
        reported.append(finding)
        if not as_json:
            print(f"{finding.state:8} {finding.name:20} {finding.sentence}", flush=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in reported], indent=2))
    return int(any(finding.state == "missing" for finding in reported))


def packages(names: Iterable[str], *, extra: str) -> Finding:
    """`extra`: the optional dependencies of pyproject.toml that bring them."""
    installed, absent = [], []
    for name in names:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            absent.append(name)
    if absent:
        return missing("packages", f"no {', no '.join(absent)}: pip install -c constraints.txt '.[{extra}]'")
    return ok("packages", ", ".join(installed))


def python() -> Finding:
    here, name = sys.version_info[:2], sys.version.split()[0]
    if here not in PYTHONS:
        wanted = " or ".join(f"{major}.{minor}" for major, minor in PYTHONS)
        return missing("Python", f"this is Python {name}, the libraries are pinned for {wanted}: make .venv with one")
    return ok("Python", f"{name} in {sys.prefix}")


def java() -> Finding:
    """The java that Spark would start: that of JAVA_HOME, else of PATH."""
    home = os.environ.get("JAVA_HOME")
    command = shutil.which("java", path=f"{home}/bin" if home else None)
    install = "install Java 17 or 21 (Debian: apt-get install default-jre-headless)"
    if command is None:
        return missing("Java", f"there is no java in {f'{home}/bin, JAVA_HOME' if home else 'PATH'}: {install}")
    text = subprocess.run([command, "-version"], capture_output=True, text=True).stderr
    match = re.search(r'version "(\d+)', text)
    if not match or int(match[1]) not in JAVAS:
        return missing(
            "Java", f"{command} is {f'Java {match[1]}' if match else 'no Java'}, Spark needs 17 or 21: {install}"
        )
    return ok("Java", f"{match[1]}, {command}")


def disk(name: str, folder: str) -> Finding:
    """Free space where something will be written; `folder` need not exist."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if not os.access(path, os.W_OK):
        return missing(name, f"{path} cannot be written by this user: choose another folder, or ask for permission")
    if free < LEAST_DISK:
        return missing(name, f"{path} has {free / 1e9:.1f} GB free, less than {LEAST_DISK / 1e9:.0f} GB: make room")
    return ok(name, f"{path} has {free / 1e9:,.0f} GB free")


def hadoop_conf() -> Finding:
    """The client's configuration of HDFS: only hdfs:// paths need one."""
    folder = os.environ.get("HADOOP_CONF_DIR")
    if not folder:
        return unused(
            "HDFS settings", "HADOOP_CONF_DIR is not set: paths need their host, as in hdfs://namenode:9820/raw"
        )
    if absent := [name for name in ("core-site.xml", "hdfs-site.xml") if not Path(folder, name).exists()]:
        return missing(
            "HDFS settings", f"HADOOP_CONF_DIR={folder} has no {' and no '.join(absent)}: copy the cluster's"
        )
    return ok("HDFS settings", folder)


def reachable(uri: str) -> Finding:
    """Whether a folder, local or on HDFS, answers."""
    try:
        folder = Folder(uri)
        if not folder.exists():
            return missing(uri, "there is no such folder: check its spelling, or make it")
        return ok(uri, f"{len(folder.names())} names in it")
    except UserError as error:
        return missing(uri, str(error))
