"""What is to be known of a job before its manifest can be rendered: jobs/facts_train.yaml and jobs/facts_spark.yaml."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from kanyun.errors import UserError


class Facts(BaseModel):
    """What is to be known of any job."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # Of a Service, too: part of host names.
    name: str = Field(pattern=r"^[a-z]([-a-z0-9]{0,40}[a-z0-9])?$")
    namespace: str = "default"
    image: str
    command: list[str] = Field(min_length=1)
    queue: str = "default"
    cpus: PositiveInt
    memory: str
    volumes: dict[str, str] = {}
    hadoop_conf: str = ""
    env: dict[str, str] = {}


class TrainFacts(Facts):
    nodes: PositiveInt
    gpus: PositiveInt
    shared_memory: str = "64Gi"
    rdma: dict[str, PositiveInt] = {}
    host_network: bool = False
    grace_seconds: PositiveInt = 900


class SparkFacts(Facts):
    executors: PositiveInt
    executor_cores: PositiveInt = 4
    executor_memory: str = "6g"
    service_account: str = "spark"


def load_facts[T: Facts](path: str, kind: type[T]) -> T:
    """Raises UserError, one sentence for each fact that is missing, unknown or of a wrong kind."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return kind.model_validate(values)
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: copy jobs/facts_train.yaml or jobs/facts_spark.yaml") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}): correct it") from error
    except ValidationError as error:
        raise UserError("; ".join(_sentence(path, kind, problem) for problem in error.errors())) from error


def _sentence(path: str, kind: type[Facts], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, n=1, cutoff=0)[0]
        return f"{path} has an unknown fact {key!r}: did you mean {near!r}?"
    if problem["type"] == "missing":
        return f"{path} has no {key}: add `{key}: ...`"
    message = problem["msg"].replace("Input should", "it should").replace("String should", "it should")
    return f"{path}: {key or 'all of it'} is {problem['input']!r}: {message}"
