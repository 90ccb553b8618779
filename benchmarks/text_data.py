"""Real text as packs, for train_text.py: Python's library sources and documentation, with Qwen's own vocabulary.

usage: python benchmarks/text_data.py OUT [MEGABYTES]      writes OUT/model (tokenizer) and OUT/stages/packed
Needs the pipeline (Spark) and PyPI's dashscope, which ships the vocabulary: run it on a CPU machine and copy OUT.
"""

import json
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from pydoc_data.topics import topics

from kanyun.cli.parser import Parser
from pipeline.recipe import Recipe, RecipeDataset
from tests.support.qwen_assets import real_tokenizer_folder

LENGTH = 8192
LONGEST = 12_000  # characters, about 3,000 tokens


def documents(limit: int) -> list[str]:
    """Texts of at most `limit` bytes in all, in a fixed order; none over LONGEST, so that packs have some samples."""
    library = Path(sysconfig.get_path("stdlib"))
    found, size = list(topics.values()), 0
    for path in sorted(library.rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            found.append(path.read_text(errors="replace"))
    found = [text for text in found if len(text) <= LONGEST]
    for number, text in enumerate(found):
        size += len(text.encode())
        if size > limit:
            return found[:number]
    return found


def main(out: Path, megabytes: float) -> None:
    (out / "raw").mkdir(parents=True, exist_ok=True)
    with (out / "raw" / "text.jsonl").open("w") as file:
        for text in documents(int(megabytes * 1e6)):
            file.write(json.dumps({"text": text}) + "\n")
    model = real_tokenizer_folder(out / "model", vision=False)
    datasets = {"text": RecipeDataset(str(out / "raw"), "text")}
    Recipe(str(out / "stages"), str(model), LENGTH, datasets, overflow="split").run(overwrite=True)


if __name__ == "__main__":
    parser = Parser(description=__doc__, example="python benchmarks/text_data.py OUT 12")
    parser.add_argument("out", type=Path)
    parser.add_argument("megabytes", type=float, nargs="?", default=6.0)
    args = parser.parse_args()
    main(args.out.resolve(), args.megabytes)
