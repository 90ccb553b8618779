"""Where a conversion writes: the whole folder appears at once, or nothing does."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kanyun.errors import UserError
from kanyun.storage import Folder


def local_path(uri: str) -> Path:
    """A path or file:// URI as a path. UserError for other storages: weights are mapped into memory."""
    folder = Folder(uri)
    if not folder.is_local:
        raise UserError(f"{folder.uri} is not on a local disk: copy it to one, then convert")
    return Path(folder.path)


@contextmanager
def new_folder(out: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden neighbour of `out`, renamed to `out` if the block succeeds, deleted if not.

    Raises UserError if `out` is not empty and `overwrite` is false, if it holds `source`, or if it cannot be written.
    """
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out} exists: choose another output, or give --overwrite to replace the folder")
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"the output {out} holds the input {source}: choose another output")
    attempt = out.parent / f"_attempt-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        attempt.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write below {out.parent} ({error}): choose an output you may write to") from error
    try:
        yield attempt
        if out.exists():
            shutil.rmtree(out)
        attempt.rename(out)
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
