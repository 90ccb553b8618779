"""The checkpoints of a run folder: finding whole ones, publishing, what stays and what goes.

    OUTPUT/checkpoints/step_00000100/           tensors as dist_checkpointing reads them, for any number of ranks
    OUTPUT/checkpoints/step_00000100/state.json where training was, on what, digests of all other files
    OUTPUT/checkpoints/step_00000100/hf/        config.json, tokenizer, processor settings: verbatim
    OUTPUT/checkpoints/latest                   text: name of the newest one, a hint for people
    OUTPUT/checkpoints/aside-.../               steps that a run left behind when it resumed from an earlier one

A checkpoint is written into a hidden folder, flushed to the disk, and renamed when it is whole. Whole ones are found
by looking. What is newer than the step that a run is at is moved aside, never deleted.
"""

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.checkpoint.direct_file import naming
from trainer.checkpoint.state import Marker, State

LATEST = "latest"
_STEP = re.compile(r"step_\d{8}")
# What a killed run leaves; other hidden names are people's, or a filesystem's (.snapshot, .nfs...).
_LEFTOVER = re.compile(r"\.(attempt|removed)-step_\d{8}|\.latest\.tmp")


class DamagedError(UserError):
    """A checkpoint's content is not what was written, though its files are there and have their sizes."""


@dataclass(frozen=True)
class Search:
    """The newest whole checkpoint of a run, and what was passed over."""

    newest: Folder | None
    passed_over: list[str] = field(default_factory=list)  # a sentence for each newer folder that is not whole
    hint: str = ""  # a sentence if `latest` does not name the newest
    named: bool = False  # this very step was asked for: no other one takes its place

    @property
    def sentences(self) -> list[str]:
        return [*self.passed_over, *([self.hint] if self.hint else [])]


def checkpoints_of(output: Folder) -> Folder:
    return output / "checkpoints"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def steps_of(output: Folder) -> list[str]:
    """Names of the step folders of a run, whole or not, oldest first."""
    return [name for name in checkpoints_of(output).names() if _STEP.fullmatch(name)]


def find(output: Folder, damaged: Mapping[str, str] | None = None) -> Search:
    """Look for the newest whole checkpoint; see `require_whole`. `damaged`: URI of a step -> why it is none."""
    passed_over: list[str] = []
    root = checkpoints_of(output)
    for name in reversed(steps_of(output)):
        step = root / name
        try:
            if damaged and step.uri in damaged:
                raise DamagedError(damaged[step.uri])
            require_whole(step)
        except UserError as error:
            passed_over.append(f"passed over {name}: {error}")
            continue
        return Search(step, passed_over, _hint(root, name))
    return Search(None, passed_over)


def _hint(root: Folder, newest: str) -> str:
    try:
        said = root.read(LATEST).decode(errors="replace").strip() if root.exists(LATEST) else None
        problem = "is missing" if said is None else f"names {said!r}"
    except UserError:  # a folder, say, which a copy makes of a link
        said, problem = None, "is no file that can be read"
    if said == newest:
        return ""
    return f"{root.path}/{LATEST} {problem}; {newest} is the newest whole checkpoint and is taken"


def latest(output: Folder) -> Folder | None:
    """Return the newest whole checkpoint of a run folder, if there is one."""
    return find(output).newest


def resolve(path: str) -> Folder:
    """Return the checkpoint that a path stands for, see `look_up`."""
    newest = look_up(path).newest
    assert newest is not None
    return newest


def look_up(path: str, damaged: Mapping[str, str] | None = None) -> Search:
    """Find the checkpoint that a run folder, its checkpoints folder, or a step folder stands for.

    `damaged`: see `find`. Raises UserError if there is none, or the step is not whole.
    """
    folder = Folder(path)
    if (_STEP.fullmatch(folder.name) and folder.exists()) or folder.exists("state.json"):
        require_whole(folder)
        return Search(folder, named=True)
    for run in (folder, folder.parent) if folder.name == "checkpoints" else (folder,):
        search = find(run, damaged)
        if search.newest is not None:
            return search
        if search.passed_over:
            raise UserError(f"{path} has no whole checkpoint ({'; '.join(search.passed_over)}): use another run")
    if folder.exists("config.json"):
        raise UserError(
            f"{path} is a Hugging Face folder, no checkpoint: `python -m convert to-megatron {path} OUT` makes one"
        )
    raise UserError(
        f"{path} is no checkpoint: give a run's output folder, or one step_... folder below its checkpoints/"
    )


def read_state(step: Folder) -> State:
    """Raises UserError if state.json is missing or damaged."""
    return Marker.read(step).state


def require_whole(step: Folder) -> None:
    """Raises UserError unless state.json is sound and of this step, and every file has its recorded size.

    Digests: see `verify`.
    """
    marker = Marker.read(step)
    if _STEP.fullmatch(step.name) and step.name != step_name(marker.state.step):
        raise UserError(f"{step.uri} holds step {marker.state.step}, by its state.json: give it its name again")
    sizes = dict(step.files())
    if marker.files is not None:
        wanted = {name: file.size for name, file in marker.files.items()}
    else:  # made before sizes were recorded: as far as torch's table of contents says
        from trainer.checkpoint.metadata import read_metadata  # takes torch, 2 s, which today's checkpoints need not

        wanted = {}
        for record in read_metadata(step):
            wanted[record.file] = max(record.offset + record.size, wanted.get(record.file, 0))
    for name, size in wanted.items():
        if name not in sizes:
            raise UserError(f"{step.uri}/{name} is missing: use another checkpoint")
        if sizes[name] < size or (marker.files is not None and sizes[name] != size):
            raise UserError(f"{step.uri}/{name} has {sizes[name]:,} bytes instead of {size:,}: use another checkpoint")


def begin_attempt(output: Folder, name: str) -> Folder:
    """Make the hidden folder that a checkpoint is written into; what a killed run left is deleted.

    Raises UserError if it cannot be written.
    """
    remove_leftovers(output)
    attempt = attempt_folder(output, name)
    attempt.make()
    return attempt


def require_writable(output: Folder) -> None:
    """Raises UserError if no checkpoint can be written, before the first step: the first save may be hours away."""
    remove_leftovers(output)
    trial = checkpoints_of(output) / f".removed-{step_name(0)}"
    trial.make()
    trial.delete()


def attempt_folder(output: Folder, name: str) -> Folder:
    return checkpoints_of(output) / f".attempt-{name}"


def publish(output: Folder, attempt: Folder, name: str, keep_last: int) -> Folder:
    """Rename a whole attempt to its name; then older steps than the `keep_last` up to it go. Newer ones stay."""
    root = checkpoints_of(output)
    final, replaced = root / name, root / f".removed-{name}"
    require_whole(attempt)
    sync(attempt)
    if final.exists():  # only where one step is saved twice
        final.move_to(replaced)
    attempt.move_to(final)
    sync(root, files=False)
    with suppress(UserError):  # a hint: where it cannot be written, the checkpoint is whole all the same
        root.write(LATEST, f"{name}\n".encode())
        sync(root, files=False)
    replaced.delete()
    steps = steps_of(output)
    done = steps[: steps.index(name) + 1]
    for old in done[:-keep_last]:
        _remove(root / old)
    return final


def set_aside(output: Folder, step: int) -> str:
    """Move steps newer than `step`, whole or not, into one aside-... folder. Return a sentence, or "" if none is."""
    root, newer = checkpoints_of(output), [name for name in steps_of(output) if name > step_name(step)]
    if not newer:
        return ""
    aside = root / f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    for name in newer:
        (root / name).move_to(aside / name)
    return f"{', '.join(newer)}: newer than step {step}, moved to {aside.path}; delete them when nobody needs them"


def remove_leftovers(output: Folder) -> None:
    """Delete what a killed run had begun to write, or to delete."""
    root = checkpoints_of(output)
    for name in root.names():
        if _LEFTOVER.fullmatch(name):
            root.delete(name)


def sync(folder: Folder, *, files: bool = True) -> None:
    """Flush a local folder, and the files in it, to the disk. HDFS has done so when a file is closed."""
    if not folder.is_local:
        return
    for path, _, names in os.walk(folder.path):
        for each in [path, *(os.path.join(path, name) for name in names if files)]:
            sync_file(each)
        if not files:
            return


def sync_file(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Folder) -> None:
    """Delete a checkpoint; killed half-way, no half of it is left under its name."""
    hidden = folder.parent / f".removed-{folder.name}"
    folder.move_to(hidden)
    hidden.delete()
