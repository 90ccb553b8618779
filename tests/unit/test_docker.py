"""Images and compose.yaml: the compose schema, and what keeps them safe. `make test-docker` builds and runs one."""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted(ROOT.glob("docker/Dockerfile.*"))
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def compose() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    return values


def test_compose_follows_its_schema() -> None:
    schema = json.loads((files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text())
    jsonschema.validate(compose(), schema)
    wrong = compose()
    wrong["services"]["namenode"]["healthchek"] = {}
    with pytest.raises(jsonschema.ValidationError, match="healthchek"):
        jsonschema.validate(wrong, schema)


def test_services_listen_on_loopback_and_say_how_they_are() -> None:
    services = compose()["services"]
    assert [
        port for service in services.values() for port in service.get("ports", ()) if "127.0.0.1:" not in port
    ] == []
    assert [name for name, service in services.items() if "healthcheck" not in service] == ["shell"]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        for other, wait in service.get("depends_on", {}).items():
            assert wait == {"condition": "service_healthy"}, other


def test_commands_are_the_entry_points_own() -> None:
    roles = set(re.findall(r"^  ([a-z-]+)\)", (ROOT / "docker/entrypoint.sh").read_text(), re.MULTILINE))
    commands = {service["command"][0] for service in compose()["services"].values()}
    assert commands - roles == {"bash"}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_a_user_and_keeps_no_secret(path: Path) -> None:
    text = path.read_text()
    stages = text.split("\nFROM ")
    assert "\nUSER kanyun\n" in stages[-1]
    assert "useradd --uid 10001 " in text, "the user of jobs/pods.py"
    for run in re.findall(r"^RUN (?:.*\\\n)*.*$", text, re.MULTILINE):
        if "pip install" in run or "setup_gpu" in run:
            assert "--mount=type=secret,id=pip,target=/etc/pip.conf" in run
        if "pip install" in run:
            assert "-c constraints.txt" in run
    assert not re.search(r"^(ARG|ENV).*(TOKEN|PASSWORD|SECRET|INDEX_URL)", text, re.MULTILINE)


def test_both_images_have_the_same_pinned_base() -> None:
    bases = {base for path in DOCKERFILES for base in re.findall(r"^ARG BASE=(.*)$", path.read_text(), re.MULTILINE)}
    (base,) = bases
    assert re.fullmatch(r"debian:trixie-\d{8}-slim", base)


def test_one_version_everywhere() -> None:
    for path in (*DOCKERFILES, *ROOT.glob("docker/*.yaml"), *ROOT.glob("jobs/facts_*.yaml")):
        assert set(re.findall(r"kanyun-(?:pipeline|trainer):([\w.]+)", path.read_text())) == {VERSION}, path


def test_hadoops_daemons_are_of_pysparks_release() -> None:
    import pyspark

    client = next(Path(pyspark.__file__).parent.glob("jars/hadoop-client-api-*.jar")).stem.rpartition("-")[2]
    assert f"hadoop-client-minicluster:{client} " in (ROOT / "docker/Dockerfile.pipeline").read_text()
