"""state.json: where training was, on what, and the digest of every file beside it."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import xxhash

from kanyun.errors import UserError
from kanyun.storage import Folder

STATE = "state.json"


@dataclass(frozen=True)
class State:
    """How far training is, and what must be the same to resume it."""

    step: int  # optimizer steps done, skipped ones too; 0 = a converted model
    consumed: int  # packs
    skipped: int  # steps whose gradient was not finite
    fingerprint: str  # of tokenizer and processor settings
    model: dict[str, Any]  # ModelConfig
    run: dict[str, Any]  # key of the config (or "data digest") -> value; empty for a converted model
    updates_before: int = 0  # Adam's steps in the run that this one continues
    schedule: dict[str, Any] = field(default_factory=dict)  # steps, lr, min_lr, warmup_steps; free to change
    resume: str = ""  # the config's `resume` under which it was made

    def __post_init__(self) -> None:
        """Raises ValueError for a value of another kind than state.json has."""
        for field_ in fields(self):
            value = getattr(self, field_.name)
            kind = field_.type if isinstance(field_.type, type) else dict
            if type(value) is not kind or (isinstance(value, int) and value < 0):
                raise ValueError(f"{field_.name} is {value!r}")
        numbers = {name: self.schedule.get(name) for name in ("steps", "lr", "min_lr", "warmup_steps")}
        if self.schedule and not all(isinstance(number, int | float) for number in numbers.values()):
            raise ValueError(f"schedule is {self.schedule!r}")

    @property
    def updates(self) -> int:
        """Steps that Adam has done, which its bias correction counts."""
        return self.updates_before + self.step - self.skipped

    def require(self, other: "State", where: str) -> None:
        """Raises UserError if resuming `self`, read from `where`, as `other` would be another training."""
        stored = {"tokenizer fingerprint": self.fingerprint, **_flat(self.model), **self.run}
        wanted = {"tokenizer fingerprint": other.fingerprint, **_flat(other.model), **other.run}
        for name, value in stored.items():
            if wanted.get(name) != value:
                free = name in self.run and name != "trainable"
                raise UserError(
                    f"{where} was made with {name} {value}, this run has {wanted.get(name)}: set it back, "
                    + (
                        "or keep weights and optimizer in another output folder with `continue_from`"
                        if free
                        else "or start a new run in another output folder"
                    )
                )


@dataclass(frozen=True)
class FileDigest:
    """What a file must be."""

    size: int  # bytes
    xxh3: str  # 128 bits, hexadecimal

    def __post_init__(self) -> None:
        """Raises ValueError for a value of another kind than state.json has."""
        if type(self.size) is not int or self.size < 0 or not isinstance(self.xxh3, str):
            raise ValueError(f"a file is {asdict(self)}")


@dataclass(frozen=True)
class Marker:
    """Content of state.json. Written last: a folder without it is no checkpoint."""

    state: State
    files: dict[str, FileDigest] | None  # relative name -> digest; None: made before digests were recorded

    def encode(self) -> bytes:
        """Return the JSON text, which ends in a digest of itself."""
        values = asdict(self.state) | {"files": {name: asdict(file) for name, file in (self.files or {}).items()}}
        return (json.dumps(values | {"digest": _digest(values)}, indent=2) + "\n").encode()

    @classmethod
    def read(cls, step: Folder) -> Self:
        """Raises UserError if there is no state.json, or it is damaged."""
        try:
            values = json.loads(step.read(STATE))
            digest, files = values.pop("digest", None), values.get("files")
            if digest is not None and digest != _digest(values):
                raise ValueError("it does not have its own digest")
            values.pop("files", None)
            if unknown := values.keys() - {field_.name for field_ in fields(State)}:
                raise UserError(
                    f"{step.uri}/{STATE} has {', '.join(sorted(unknown))}, which a newer version must have written: "
                    "use that version, or another checkpoint"
                )
            digests = None if files is None else {name: FileDigest(**file) for name, file in files.items()}
            return cls(State(**values), digests)
        except FileNotFoundError as error:
            raise UserError(f"{step.uri} has no {STATE}: it is not a whole checkpoint; use another one") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{step.uri}/{STATE} is damaged ({error}): use another checkpoint") from error


def _digest(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """{"vision": {"depth": 2}} -> {"vision depth": 2}; tuples as lists, which JSON does not tell apart."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        inner = _flat(value) if isinstance(value, dict) else {"": list(value) if isinstance(value, tuple) else value}
        flat |= {f"{name} {key}".strip(): deep for key, deep in inner.items()}
    return flat
