"""manifest.json: what a packed dataset is, and proof of it. A folder without one is not a dataset."""

import json
import subprocess
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from kanyun.errors import DatasetError
from kanyun.naming import FORMAT_VERSION, MANIFEST
from kanyun.storage import Folder

_ROOT = Path(__file__).absolute().parent.parent  # of a clone


def digest_of(data: bytes) -> str:
    """xxh3-128 as 32 hex characters: against accidents, not against forgers."""
    return xxhash.xxh3_128_hexdigest(data)


def canonical(value: Any) -> bytes:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@cache
def code_version() -> str:
    """Return the release of this code, and the commit where it is a clone: 0.1.0+3262d02c8e7f, or ...-dirty."""
    try:
        release = version("kanyun")
    except PackageNotFoundError:  # a copy that is not installed
        release = "0"
    if not (_ROOT / ".git").exists():
        return release
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or another user's clone
        return release
    return f"{release}+{commit}"


@dataclass(frozen=True)
class ShardInfo:
    name: str
    bytes: int
    packs: int
    header_digest: str  # of the schema and dictionary messages, from byte 8 to the first record batch
    digest: str  # of the file's bytes
    lineage_digest: str  # of its lineage file's bytes


@dataclass(frozen=True)
class Counts:
    """Samples through the packing job: rows_in + added = packed + quarantined + dropped."""

    rows_in: int
    packed: int
    added: int = 0
    quarantined: int = 0
    dropped: int = 0

    def check(self, what: str) -> None:
        """Raises DatasetError if a row is unaccounted for."""
        if self.rows_in + self.added != self.packed + self.quarantined + self.dropped:
            raise DatasetError(
                f"{what}: {self.rows_in} rows in + {self.added} added is not {self.packed} packed + "
                f"{self.quarantined} quarantined + {self.dropped} dropped: a row was lost; run the job again"
            )


@dataclass(frozen=True)
class Manifest:
    """Describes one packed dataset: with batches.arrow, all that training, `verify` and people need to know."""

    length: int  # token slots a pack
    vision_budget: int  # patches a pack may have; 0 = text only
    part: int
    epoch: int
    seed: int
    ratios: dict[str, str]  # data path -> sampling ratio, as written
    counts: Counts
    packs: int
    tokens: int  # useful token slots, <= packs x length
    patches: int
    packs_lower_bound: int  # no packing of these samples needs fewer
    tokenizer: str  # fingerprint digest of tokenizer + processor settings
    processor: dict[str, Any] | None  # processor settings, see fingerprint.py; None = text only
    pad_token_id: int
    image_token_id: int | None
    shards: tuple[ShardInfo, ...]
    batches_digest: str  # of batches.arrow
    seq_align: int = 1
    format_version: int = FORMAT_VERSION
    code_version: str = field(default="", compare=False)

    @property
    def fill(self) -> float:
        """Useful tokens / slots."""
        return self.tokens / (self.packs * self.length) if self.packs else 0.0

    @property
    def content_digest(self) -> str:
        """Digest over all that training can see; the version of the code is no part of it."""
        values = asdict(self)
        del values["code_version"]
        return digest_of(canonical(values))

    def save(self, folder: Folder) -> None:
        values = {"content_digest": self.content_digest, "fill": round(self.fill, 6), **asdict(self)}
        folder.write(MANIFEST, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Folder) -> "Manifest":
        """Raises DatasetError: missing, another format version, damaged, or edited by hand."""
        if not folder.exists(MANIFEST):
            raise DatasetError(
                f"{folder.uri} has no {MANIFEST}, so it is not a finished packed dataset: run the pack job (again)"
            )
        where = f"{folder.uri}/{MANIFEST}"
        try:
            values = json.loads(folder.read(MANIFEST))
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise DatasetError(
                    f"{where} has format version {version}, this code reads {FORMAT_VERSION}: pack the data again"
                )
            known = {f.name: values[f.name] for f in fields(cls)}
            known["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
            known["counts"] = Counts(**values["counts"])
            manifest = cls(**known)
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{where} is damaged ({error!r}): fetch or pack the dataset again") from error
        for name, actual in (("content_digest", manifest.content_digest), ("fill", round(manifest.fill, 6))):
            if values.get(name) != actual:
                raise DatasetError(
                    f"{where} says {name} {values.get(name)}, but its other values give {actual}: it was "
                    "changed after it was written; fetch or pack the dataset again"
                )
        return manifest
