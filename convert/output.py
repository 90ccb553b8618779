"""Where a conversion writes: the whole folder appears at once, or nothing does."""

import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.store import sync, sync_file


def local_path(uri: str) -> Path:
    """Return a path or file:// URI as a path. Raises UserError for other storages: weights are mapped into memory."""
    folder = Folder(uri)
    if not folder.is_local:
        raise UserError(f"{folder.uri} is not on a local disk: copy it to one, then convert")
    return Path(folder.path)


@contextmanager
def new_folder(out: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder beside `out`, or beside what it links to, renamed to it if the block succeeds, deleted if not.

    What killed conversions to `out` left is deleted first. Raises UserError if `out` is not empty and `overwrite` is
    false, if it holds `source`, the folder that this process is in, or what a run has trained, if it is a mount point,
    or if it cannot be written.
    """
    out = Path(os.path.realpath(out))
    attempt = out.parent / f"_attempt-{out.name}-{uuid.uuid4().hex[:8]}"
    try:
        _remove_dead(out)
        _refuse(out, source, overwrite)
        attempt.mkdir(parents=True)
        lock = os.open(attempt, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write below {out.parent} ({error}): choose an output you may write to") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held by this process while it lives; the kernel frees it even after kill -9
        yield attempt
        sync(Folder(str(attempt)))
        _refuse(out, source, overwrite)  # another conversion may have ended, or a run begun
        _publish(attempt, out, overwrite)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error}): make room, or choose another output") from error
    except UserError as error:  # by its lasting name
        raise type(error)(str(error).replace(str(attempt), str(out))) from error
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
        os.close(lock)


def _refuse(out: Path, source: Path, overwrite: bool) -> None:
    """Raise UserError if `out` must not be replaced, or cannot be."""
    if out.exists() and not (out.is_dir() and (overwrite or not any(out.iterdir()))):
        way_out = ", or give --overwrite to replace the folder" if out.is_dir() else ""
        raise UserError(f"{out} exists: choose another output{way_out}")
    if source.resolve().is_relative_to(out):
        raise UserError(f"the output {out} holds the input {source}: choose another output")
    if out.is_mount():
        raise UserError(f"the output {out} is a mount point, which cannot be renamed: choose a folder in it")
    if Path.cwd().is_relative_to(out):
        raise UserError(f"the output {out} is replaced as a whole, and holds the folder you are in: leave it first")
    if _is_trained(out):
        raise UserError(
            f"{out} holds checkpoints of a training run, which no conversion replaces: choose another output"
        )


def _publish(attempt: Path, out: Path, overwrite: bool) -> None:
    """Rename to `out`, which is empty or absent, or of which `overwrite` says that it may go. Raises OSError if not."""
    replaced = attempt.with_name(f"{attempt.name}-replaced")
    if overwrite:
        with suppress(FileNotFoundError):
            out.rename(replaced)
    attempt.rename(out)
    sync_file(str(out.parent))
    shutil.rmtree(replaced, ignore_errors=True)


def _is_trained(out: Path) -> bool:
    """Return whether a folder is a run, its checkpoints folder, or one of its steps. A converted model has step 0."""
    trained = [step for step in (*out.glob("checkpoints/step_*"), *out.glob("step_*")) if step.name != "step_00000000"]
    return bool(trained) or any((out / name).exists() for name in ("run.json", "state.json"))


def _remove_dead(out: Path) -> None:
    """Delete the attempts at `out` whose process has ended; what one of them was about to replace comes back."""
    attempts = re.compile(rf"_attempt-{re.escape(out.name)}-[0-9a-f]{{8}}(-replaced)?")
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        if (match := attempts.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            try:
                lock = os.open(path, os.O_RDONLY)
            except OSError:  # another user's, or another process has just removed it
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if match[1] and not out.exists():
                    path.rename(out)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass  # a conversion that runs
            finally:
                os.close(lock)
