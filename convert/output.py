"""Where a conversion writes: the whole folder appears at once, or nothing does."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.store import sync


def local_path(uri: str) -> Path:
    """Return a path or file:// URI as a path. Raises UserError for other storages: weights are mapped into memory."""
    folder = Folder(uri)
    if not folder.is_local:
        raise UserError(f"{folder.uri} is not on a local disk: copy it to one, then convert")
    return Path(folder.path)


@contextmanager
def new_folder(out: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `out`, renamed to `out` if the block succeeds, deleted if not.

    What killed conversions to `out` left is deleted first. Raises UserError if `out` is not empty and `overwrite` is
    false, if it holds `source` or what a run has trained, or if it cannot be written.
    """
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        raise UserError(f"{out} exists: choose another output, or give --overwrite to replace the folder")
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"the output {out} holds the input {source}: choose another output")
    if _is_trained(out):
        raise UserError(
            f"{out} holds checkpoints of a training run, which no conversion replaces: choose another output"
        )
    _remove_dead(out)
    attempt = out.parent / f"_attempt-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        attempt.mkdir(parents=True)
        lock = os.open(attempt, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write below {out.parent} ({error}): choose an output you may write to") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by this process while it lives; the kernel frees it even after kill -9
        yield attempt
        sync(Folder(str(attempt)))
        if out.exists():
            replaced = attempt.with_name(f"{attempt.name}-replaced")
            out.rename(replaced)
            attempt.rename(out)
            shutil.rmtree(replaced)
        else:
            attempt.rename(out)
        sync(Folder(str(out.parent)), files=False)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error}): make room, or choose another output") from error
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
        os.close(lock)


def _is_trained(out: Path) -> bool:
    """Return whether a folder is a run, its checkpoints folder, or one of its steps. A converted model has step 0."""
    trained = [step for step in (*out.glob("checkpoints/step_*"), *out.glob("step_*")) if step.name != "step_00000000"]
    return bool(trained) or any((out / name).exists() for name in ("run.json", "state.json"))


def _remove_dead(out: Path) -> None:
    """Delete the attempts at `out` whose process has ended."""
    attempts = re.compile(rf"_attempt-{re.escape(out.name)}-[0-9a-f]{{8}}(-replaced)?")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if attempts.fullmatch(path.name) and path.is_dir():
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # a conversion that runs
            finally:
                os.close(lock)
