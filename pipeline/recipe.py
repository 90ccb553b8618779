"""A recipe: the five stages in a row, from several raw folders to one packed dataset.

output: /data/run1                    # stages go to OUTPUT/preprocess/NAME, filter/NAME, sample, build, packed/
tokenizer: /models/Qwen2.5-VL-7B      # Hugging Face folder
length: 8192
datasets:
  charts: {raw: /raw/charts, dataset: llava, ratio: 0.5}
  wiki: {raw: hdfs://host:port/raw/wiki, dataset: text}
overflow: split                       # optional, as are epoch, seed, part, near_duplicates, and a dataset's ratio (1)
"""

import difflib
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, get_origin

import yaml

from kanyun.errors import UserError
from kanyun.storage import Folder
from pipeline.flow import INDEX, Done, write_index
from pipeline.stages.base import Stage
from pipeline.stages.build import BuildStage
from pipeline.stages.filter import FilterStage
from pipeline.stages.pack import PackStage
from pipeline.stages.preprocess import PreprocessStage
from pipeline.stages.sample import SampleStage

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
        """Raises UserError: no such file, no YAML, a key unknown, missing or of a wrong type."""
        file = Folder(path)
        if not file.exists():
            raise UserError(f"there is no recipe {path}: give a YAML file (pipeline/recipe.py shows one)")
        try:
            values = yaml.safe_load(file.read(""))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML: {error}") from error
        recipe = _checked(cls, values, path)
        if not recipe.datasets:
            raise UserError(f"{path}: datasets is empty, give at least one as NAME: {{raw: DIR, dataset: CLASS}}")
        named = {str(name): _checked(RecipeDataset, one, f"{path}: {name}") for name, one in recipe.datasets.items()}
        return replace(recipe, datasets=named)

    def run(self, overwrite: bool) -> None:
        """Raises what the stages raise; what was finished before is skipped."""
        out = Folder(self.output)
        done: list[Done] = []

        def run(stage: Stage, folder: str, name: str = "") -> None:
            done.append(Done(folder, stage.run(overwrite), name))

        at = {stage: (out / stage).uri for stage in ("preprocess", "filter", "sample", "build", "packed")}
        for name, one in self.datasets.items():
            checked = f"{at['preprocess']}/{name}"
            run(PreprocessStage(one.raw, checked, one.dataset), f"preprocess/{name}", name)
            run(FilterStage(checked, f"{at['filter']}/{name}", self.near_duplicates), f"filter/{name}", name)
        ratios = {name: one.ratio for name, one in self.datasets.items()}
        out.write(RATIOS, yaml.safe_dump(ratios).encode())
        run(SampleStage(at["filter"], at["sample"], self.epoch, self.seed, (out / RATIOS).uri), "sample")
        run(BuildStage(at["sample"], at["build"], self.tokenizer, self.length, self.overflow), "build")
        pack = PackStage.below(at["build"], at["packed"], self.length, self.part, self.epoch)
        run(pack, f"packed/{Folder(pack.output).name}")
        write_index(out, done)
        print(f"the way of the rows, with all reports: {out.path}/{INDEX}")


def _checked[T: (Recipe, RecipeDataset)](kind: type[T], values: Any, where: str) -> T:
    """`values` as this class. Raises UserError for a key that is unknown or missing, or a value of a wrong type."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is {values!r:.100}, keys and values are needed: {', '.join(_keys(kind))}")
    for key, value in values.items():
        if key not in _keys(kind):
            nearest = difflib.get_close_matches(str(key), _keys(kind), n=1, cutoff=0)[0]
            raise UserError(f"{where}: unknown key {key!r}, the nearest known one is {nearest!r}")
        wanted = _keys(kind)[key]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise UserError(f"{where}: {key} is {value!r:.100}, {_WORDS[wanted]} is needed")
    for field in fields(kind):
        if field.default is MISSING and field.name not in values:
            raise UserError(f"{where}: the key {field.name!r} is missing, add it")
    return kind(**values)


_WORDS: dict[Any, str] = {str: "a string", int: "a whole number", float: "a number", dict: "NAME: {...}"}


def _keys(kind: type[Any]) -> dict[str, Any]:
    return {field.name: get_origin(field.type) or field.type for field in fields(kind)}
