"""A recipe: all stages in a row, from several raw folders to one packed dataset.

output: /data/run1                    # stages go to OUTPUT/preprocess/NAME, filter/NAME, sample, build, packed/
tokenizer: /models/Qwen2.5-VL-7B      # Hugging Face folder
length: 8192
datasets:
  charts: {raw: /raw/charts, dataset: llava, ratio: 0.5}
  wiki: {raw: hdfs://host:port/raw/wiki, dataset: text}
overflow: split                       # optional, as are epoch, seed, part, near_duplicates, and a dataset's ratio (1)
"""

import difflib
import posixpath
import re
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, get_origin

import yaml

from kanyun.errors import UserError
from kanyun.fingerprint import check_images
from kanyun.storage import Folder
from pipeline.datasets import dataset
from pipeline.flow import INDEX, Done, write_index
from pipeline.ratios import ratio_of
from pipeline.readers.raw_folder import RawFolder
from pipeline.reports.report import REPORT
from pipeline.stages.attempt import is_attempt
from pipeline.stages.table import STAGES, StageEntry, check_settings
from pipeline.tokenizer_settings import Settings
from pipeline.yaml_file import load_yaml

if TYPE_CHECKING:
    from pipeline.stages.base import Stage

_ODD = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, halves of surrogate pairs
MOST_NAME = 200  # bytes: file systems take 255, and an attempt's name has 52 more while it starts
RATIOS = "ratios.yaml"  # in the output: the recipe's ratios, as `sample --ratios` takes them


@dataclass(frozen=True)
class RecipeDataset:
    raw: str
    dataset: str
    ratio: float = 1


@dataclass(frozen=True)
class Recipe:
    output: str
    tokenizer: str
    length: int
    datasets: dict[str, RecipeDataset]
    overflow: str = "drop"
    near_duplicates: str = "keep"
    epoch: int = 0
    seed: int = 0
    part: int = 0

    @classmethod
    def load(cls, path: str) -> "Recipe":
        """Read a recipe.

        Raises UserError: no file, no YAML; a key that is unknown, missing or of a wrong type; a value out of its range,
        an unknown dataset class, a name that no folder can have.
        """
        recipe = _checked(cls, load_yaml(path, "recipe (a YAML file; pipeline/recipe.py shows one)"), path)
        if not recipe.datasets:
            raise UserError(f"{path}: datasets is empty, give at least one as NAME: {{raw: DIR, dataset: CLASS}}")
        datasets = {name: _checked(RecipeDataset, one, f"{path}: {name}") for name, one in recipe.datasets.items()}
        _check_names(list(datasets), path)
        check_settings({field.name: getattr(recipe, field.name) for field in fields(cls)}, f"{path}: ")
        for name, one in datasets.items():
            ratio_of(name, one.ratio)
            dataset(one.dataset)
        return replace(recipe, datasets=datasets)

    def run(self, overwrite: bool) -> None:
        """Run the stages; finished work is skipped. Raises what they raise.

        Raw folders, tokenizer and the outputs of all datasets are looked at first: the last dataset's turn comes hours
        later.
        """
        for path, one in self.datasets.items():
            RawFolder(one.raw)
            self._stage(STAGES[0], one.raw, path, dataset=one.dataset).target()
        Settings.load(self.tokenizer)
        out = Folder(self.output)
        done: list[Done] = []

        def run(entry: StageEntry, source: str, path: str, **settings: Any) -> str:
            """Run a stage; return its output."""
            stage = self._stage(entry, source, path, **settings)
            report = stage.run(overwrite)
            if report.has_images:
                check_images(Folder(self.tokenizer))
            done.append(Done(posixpath.relpath(Folder(stage.output).path, out.path), report, path))
            return stage.output

        per_path = [entry for entry in STAGES if entry.per_path]
        for path, one in self.datasets.items():
            source = one.raw
            for entry in per_path:
                own = {"dataset": one.dataset} if "dataset" in entry.options else {}
                source = run(entry, source, path, **own)
        out.write(RATIOS, yaml.safe_dump({path: one.ratio for path, one in self.datasets.items()}).encode())
        source = (out / per_path[-1].output).uri
        for entry in STAGES[len(per_path) :]:
            own = {"ratios": (out / RATIOS).uri} if "ratios" in entry.options else {}
            source = run(entry, source, "", **own)
        write_index(out, done)
        print(f"row flow, with all reports: {out.path}/{INDEX}")

    def _stage(self, entry: StageEntry, source: str, path: str, **settings: Any) -> "Stage":
        """Return a stage, with the settings that the recipe has for it."""
        known = {name: getattr(self, name) for name in entry.options if hasattr(self, name)}
        output = Folder(self.output) / entry.output / path
        return entry.load().for_command(source, output.uri, **known | settings)


def _check_names(names: list[str], recipe: str) -> None:
    """Raise UserError if a data path cannot be a folder below the output, or lies in another one."""
    for name in names:
        parts = name.split("/")
        if any(part in ("", ".", "..", REPORT) or is_attempt(part) for part in parts) or _ODD.search(name):
            raise UserError(f"{recipe}: {name!r} is no name for a dataset: give one like charts or web/en")
        if (longest := max(len(part.encode()) for part in parts)) > MOST_NAME:
            raise UserError(f"{recipe}: {name!r:.60}... has {longest} bytes, a name may have {MOST_NAME}: shorten it")
        for count in range(1, len(parts)):
            if (outer := "/".join(parts[:count])) in names:
                raise UserError(
                    f"{recipe}: the outputs of {name} would lie in those of {outer}, and be deleted with them: "
                    f"rename one, for example {outer} to {outer}/all"
                )


def _checked[T: (Recipe, RecipeDataset)](kind: type[T], values: Any, where: str) -> T:
    """Return `values` as this class. Raises UserError: a key is unknown or missing, or a value has a wrong type."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r:.100}, keys and values are needed: {', '.join(_keys(kind))}")
    for key, value in values.items():
        if key not in _keys(kind):
            nearest = difflib.get_close_matches(str(key), _keys(kind), n=1, cutoff=0)[0]
            raise UserError(f"{where}: unknown key {key!r}, the nearest known one is {nearest!r}")
        expected = _keys(kind)[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if expected is float else expected):
            raise UserError(f"{where}: {key} is {value!r:.100}, {_WORDS[expected]} is needed")
        if isinstance(value, str) and _ODD.search(value):
            raise UserError(f"{where}: {key} is {value!r:.100}, which has characters that no path should have")
    for field in fields(kind):
        if field.default is MISSING and field.name not in values:
            raise UserError(f"{where}: the key {field.name!r} is missing, add it")
    return kind(**values)


_WORDS: dict[Any, str] = {str: "a string", int: "a whole number", float: "a number", dict: "NAME: {...}"}


def _keys(kind: type[Any]) -> dict[str, Any]:
    return {field.name: get_origin(field.type) or field.type for field in fields(kind)}
