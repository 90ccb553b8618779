"""Tables of the README files, made from benchmarks/cards/, one card a model and GPU: python -m benchmarks.card_tables.

A table stands between `<!-- cards NAME -->` and `<!-- /cards -->`; tests/unit/test_cards.py fails where it is not what
the cards say.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kanyun.cli.parser import Parser

ROOT = Path(__file__).parents[1]
FILES = ("README.md", "README.zh.md", "benchmarks/README.md")
_TABLE = re.compile(r"(<!-- cards (\w+) -->\n).*?(<!-- /cards -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """Whole training steps of one card, as a script of benchmarks/ printed them."""

    work: str | int  # text; pictures a pack, or mix
    who: str
    date: str
    tokens_per_second: int
    tflops: int
    memory_gb: float
    predicted_gb: float | None = None
    mfu_percent: float | None = None
    recomputed: str = ""
    first_step_seconds: int | None = None
    data_wait_percent: float | None = None
    asked: str = ""
    earlier: bool = False  # on another machine than the other rows

    @property
    def ours(self) -> bool:
        return self.who.startswith("ours")

    @property
    def default(self) -> bool:
        return "default" in self.who


@dataclass(frozen=True)
class Card:
    """What is known of a model on a GPU."""

    model: str
    gpu: str
    training: Sequence[Row]
    values: dict[str, Any]  # the whole file

    @property
    def size(self) -> str:
        return self.model.removeprefix("Qwen2.5-") + (f", {self.gpu}" if self.gpu != "H100" else "")

    def ratio(self, row: Row) -> str:
        """Return the row's tokens/s over those of the peer on the same work."""
        peers = [peer for peer in self.training if not peer.ours and peer.work == row.work]
        return f"{row.tokens_per_second / peers[0].tokens_per_second:.2f}" if row.ours and peers else ""


def cards() -> list[Card]:
    """Read all cards: texts first, then by family and size. A key that Row does not know is an error."""
    found = []
    for file in (ROOT / "benchmarks/cards").glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        rows = [Row(**row) for row in values["training"]]
        assert file.stem == f"{values['model']}-{values['gpu']}", file
        found.append(Card(values["model"], values["gpu"], rows, values))
    return sorted(found, key=lambda card: ("VL" in card.model, card.model.split("-")[0], _billions(card.model)))


def _billions(model: str) -> float:
    return float(re.findall(r"([\d.]+)B", model)[0])


def text(found: Sequence[Card]) -> list[str]:
    head = "| model | | tokens/s | TFLOP/s | MFU | memory, predicted | first step | data wait | ours / peer | asked |"
    lines = [head, "|---|---|--:|--:|--:|---|--:|--:|--:|---|"]
    for card in found:
        for row in card.training:
            if row.work == "text":
                mfu = f"{row.mfu_percent} %"
                lines.append(_line(card.size, row, mfu, _memory(row), *_waits(row), _ratio(card, row), row.asked))
    return lines


def vision(found: Sequence[Card]) -> list[str]:
    head = "| pictures a pack | | tokens/s | TFLOP/s | memory, predicted | recomputed | data wait | first step |"
    lines = [head + " ours / peer | asked |", "|---|---|--:|--:|---|---|--:|--:|--:|---|"]
    for card in found:
        for row in card.training:
            if row.work != "text":
                label = str(row.work) + ("" if card.model.endswith("3B") else f", {card.size}")
                first, wait = _waits(row)
                cells = (_memory(row), row.recomputed, wait, first, _ratio(card, row), row.asked)
                lines.append(_line(label + (" *" if row.earlier else ""), row, *cells))
    return lines


def summary(found: Sequence[Card]) -> list[str]:
    """Of each model the default on its largest work; for the first page."""
    lines = ["| | GPU | tokens/s | TFLOP/s | Hugging Face + Liger |", "|---|---|--:|--:|--:|"]
    for card in found:
        row = [row for row in card.training if row.default and row.work != "mix"][-1]
        work = "" if row.work == "text" else f", {row.work} x {card.values['side']}²"
        peer = f"x {card.ratio(row)}" if card.ratio(row) else ""
        lines.append(_cells(card.model + work, card.gpu, f"{row.tokens_per_second:,}", str(row.tflops), peer))
    return lines


def _line(label: str, row: Row, *cells: str) -> str:
    tokens = f"{row.tokens_per_second:,}"
    return _cells(label, row.who, f"**{tokens}**" if row.default else tokens, str(row.tflops), *cells)


def _cells(*cells: str) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _memory(row: Row) -> str:
    return f"{row.memory_gb} GB" + (f", {row.predicted_gb}" if row.predicted_gb else "")


def _waits(row: Row) -> tuple[str, str]:
    first = "" if row.first_step_seconds is None else f"{row.first_step_seconds} s"
    return first, "" if row.data_wait_percent is None else f"{row.data_wait_percent} %"


def _ratio(card: Card, row: Row) -> str:
    ratio = card.ratio(row)
    return f"**{ratio}**" if ratio and row.default else ratio


TABLES = {"text": text, "vision": vision, "summary": summary}


def rendered(page: str) -> str:
    """Return a page with its tables as the cards are."""
    found = cards()
    return _TABLE.sub(lambda m: "\n".join([m[1], *TABLES[m[2]](found), "", m[3]]), page)


if __name__ == "__main__":
    Parser(description=__doc__, example="python -m benchmarks.card_tables").parse_args()
    for name in FILES:
        file = ROOT / name
        file.write_text(rendered(file.read_text()))
        print(name)
