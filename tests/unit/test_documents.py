"""Commands in the documents are those of today: every block is parsed by the command's own parser, or run dry."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.recipe import Recipe
from trainer.config import load_config

ROOT = Path(__file__).parents[2]
# A page, and the same page in Chinese: their blocks are the same but for comments.
PAIRS = [
    ("README.md", "README.zh.md"),
    *((f"docs/{page.name}", f"docs/zh/{page.name}") for page in sorted(ROOT.glob("docs/zh/*.md"))),
]
PAGES = [page for pair in PAIRS for page in pair]


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def without_comments(block: str) -> str:
    return "\n".join(line for part in block.splitlines() if (line := re.sub(r"(^|\s)#.*$", "", part).rstrip()))


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in without_comments(block).splitlines()]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_blocks(english: str, chinese: str) -> None:
    for language in ("", "bash", "yaml", "python", "json"):
        ours, theirs = ([without_comments(block) for block in blocks(page, language)] for page in (english, chinese))
        assert ours == theirs, language


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_structure(english: str, chinese: str) -> None:
    """As many headings of each level and rows of tables: a section that was added to one is missed in the other."""
    shapes = []
    for page in (english, chinese):
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        lines = text.splitlines()
        shapes.append(
            (
                [len(line) - len(line.lstrip("#")) for line in lines if line.startswith("#")],
                sum(line.startswith("|") for line in lines),
                sum(line.lstrip().startswith("- ") for line in lines),
            )
        )
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_both_languages_have_the_same_figures(english: str, chinese: str) -> None:
    """Every figure of a table's row, and in the text of a section those with a decimal or three digits and more."""
    found = []
    for page in (english, chinese):
        text = re.sub(r"^```.*?^```$|\b\d+ 月", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        rows = [sorted(re.findall(r"\d[\d.,]*\d|\d", line)) for line in text.splitlines() if line.startswith("|")]
        sections = re.split(r"^#+ .*$", text, flags=re.MULTILINE)
        large = r"(?<![\w.])\d[\d,]*\.\d+|\d[\d,]{2,}\d"
        found.append((rows, [sorted(re.findall(large, section)) for section in sections]))
    for ours, theirs in zip(*found):
        assert ours == theirs


@pytest.mark.parametrize("page", [chinese for _, chinese in PAIRS])
def test_chinese_sentences_are_not_broken_over_lines(page: str) -> None:
    """A browser shows a line's end as a space, which is wrong between two Chinese characters and after a comma."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert (
        re.findall(r"^(?! {4})(?:[^|#\n].*)?(?:[\u4e00-\u9fff]\n(?=[\u4e00-\u9fff])|[，；：、（]\n(?=\w))", text, re.M)
        == []
    )


@pytest.mark.parametrize("page", [english for english, _ in PAIRS])
def test_every_command_is_one_that_exists(page: str) -> None:
    exported: dict[str, str] = {}
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "export":
            exported |= dict(word.split("=", 1) for word in words[1:])
        elif words != ["source", ".venv/bin/activate"]:
            check(words, exported)


def check(words: list[str], exported: dict[str, str]) -> None:
    """Parse a command, or what a script of jobs/ would run, by the parser of its module; ask make for its recipe."""
    environment = dict(exported)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    if words[:2] == ["python", "-m"]:
        parse(words[2], words[3:])
    elif words[0] == "make":
        dry_run(["make", "-n", *words[1:]], environment)
    else:
        assert words[0].startswith("jobs/"), f"{words}: what is this?"
        printed = shlex.split(dry_run(words, environment | {"DRY_RUN": "1", "PYTHON": sys.executable}).splitlines()[-1])
        if str(ROOT / "jobs/spark_main.py") in printed:
            parse("pipeline", printed[printed.index(str(ROOT / "jobs/spark_main.py")) + 1 :])
        elif str(ROOT / "trainer/launch.py") in printed:
            config, *changes = printed[printed.index("--") + 1 :]
            load_config(str(ROOT / config), changes)
        elif words[0] != "jobs/pack_env.sh":
            module = printed.index("-m") + 1
            parse(printed[module], printed[module + 1 :])


def parse(module: str, arguments: list[str]) -> None:
    package = importlib.util.find_spec(f"{module}.__main__") if "." not in module else None
    found = importlib.import_module(f"{module}.__main__" if package else module)
    if hasattr(found, "parser"):
        found.parser().parse_args(arguments)
    else:  # a module that is one command, which only prints
        done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()


def dry_run(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")])
def test_recipes_are_read(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        values = yaml.safe_load(block)
        assert "datasets" in values, "a block of YAML is a recipe"
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        assert set(Recipe.load(str(file)).datasets) == set(values["datasets"])


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    here = (ROOT / page).parent
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text())
    assert [t for t in targets if not t.startswith("https://") and not (here / t).exists()] == []


def literals() -> str:
    """The texts of all strings in the packages; what is filled in is left out."""
    found = []
    for package in ("kanyun", "pipeline", "trainer", "convert"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("\0".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\0".join(found)


@pytest.mark.parametrize("page", ["docs/operations.md", "docs/zh/operations.md"])
def test_error_sentences_are_those_of_the_code(page: str) -> None:
    """The first column of the tables under the headings of errors: what a command prints, in code's quotes."""
    text = literals()
    cells = [line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    quoted = [part for cell in cells for part in re.findall(r"`([^`]+)`", cell) if not part.isupper()]
    assert len(quoted) > 35
    assert [part for part in quoted if part not in text and part != "ModuleNotFoundError"] == []


def build_site(sources: Path, site: Path) -> tuple[int, str]:
    """Build the site as `make docs` does, but not --quiet, which keeps warnings from --strict: nothing would fail."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=sources,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_link_that_leads_nowhere_fails_the_site(tmp_path: Path) -> None:
    assert "mkdocs build --strict\n" in (ROOT / "Makefile").read_text()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs/scale.md").open("a") as page:
        page.write("\n[x](nowhere.md) [y](design.md#nowhere)\n")
    code, said = build_site(tmp_path, tmp_path / "site")
    assert code == 1
    assert re.findall("WARNING.*'(nowhere.md|#nowhere)'", said) == ["nowhere.md", "#nowhere"], said


def test_the_site_is_built_and_asks_nobody(tmp_path: Path) -> None:
    """A link or an anchor that leads nowhere fails. Nothing is fetched from outside."""
    code, said = build_site(ROOT, tmp_path)
    assert code == 0, said
    pages = list(tmp_path.rglob("*.html"))
    assert {path.relative_to(tmp_path).as_posix() for path in pages} >= {
        "index.html",
        "operations.html",
        "zh/index.html",
    }
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?([^\"'\s>]+)", page.read_text())
        assert loaded
        assert [url for url in loaded if re.match(r"(?:https?:)?//", url)] == [], page


def test_every_benchmark_has_an_example_in_its_help() -> None:
    """They are read, not run: most of them import torch."""
    scripts = {path.stem: path.read_text() for path in ROOT.glob("benchmarks/*.py")}
    commands = {name: text for name, text in scripts.items() if "__main__" in text}
    example = r'example ?= ?"python (?:-m benchmarks\.|benchmarks/)%s\b'
    assert len(commands) > 20
    assert [name for name, text in commands.items() if not re.search(example % name, text)] == []
