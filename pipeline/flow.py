"""index.html: the row flow of a recipe, from raw rows to packs, by the counts in the stages' reports.

It is a Sankey diagram from top to bottom: one level a stage; nodes and links are as wide as their number of rows. Links
leave at the left of a node; lost rows leave at its right end, where added rows come in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kanyun.storage import Folder
from pipeline.reports.page import render
from pipeline.reports.report import Report
from pipeline.stages.table import STAGES

INDEX = "index.html"
LEVELS = [stage.name for stage in STAGES]
COLOURS = 6  # of base.html, --s0 ...; further data paths repeat them
# Of the drawing: pixels from a level to the next and of a node, percent between nodes and of the thinnest link.
LEVEL, NODE, GAP, THINNEST = 104, 14, 1.0, 0.4


@dataclass(frozen=True)
class Done:
    """A finished stage of a recipe."""

    folder: str  # below the recipe's output
    report: Report
    path: str = ""  # data path; empty from sample on

    @property
    def node(self) -> tuple[str, str]:
        return self.report.stage, self.path


@dataclass(frozen=True)
class Link:
    """Rows that go from one node to another."""

    source: tuple[str, str] | None  # (stage, data path); None = they enter: `what` is "raw" or "added"
    target: tuple[str, str] | None  # None = they leave: `what` is the reason, "dropped" or "packed"
    rows: int
    what: str = ""


def links(run: Sequence[Done]) -> list[Link]:
    """Return all links into and out of each node. `run`: the stages of one recipe, in the order in which they ran."""
    result = []
    for done in run:
        counts, (stage, path) = done.report.counts, done.node
        if stage == LEVELS[0]:
            result.append(Link(None, done.node, counts.rows_in, "raw"))
        if counts.added:
            result.append(Link(None, done.node, counts.added, "added"))
        if stage == LEVELS[-1]:
            result.append(Link(done.node, None, counts.rows_out, "packed"))
        else:
            following = STAGES[LEVELS.index(stage) + 1]
            target = (following.name, path if following.per_path else "")
            result.append(Link(done.node, target, counts.rows_out))
        result += [Link(done.node, None, rows, reason) for reason, rows in counts.quarantined.items()]
        if counts.dropped:
            result.append(Link(done.node, None, counts.dropped, "dropped"))
    return result


@dataclass(frozen=True)
class Shape:
    """A part of the drawing, which is 100 units wide (stretched to the page) and as high as its pixels."""

    kind: str  # node | link | falls | rises
    d: str  # SVG path
    colour: str  # a variable of base.html, less its dashes
    title: str


def sankey(run: Sequence[Done]) -> list[Shape]:
    """Return the nodes and links of a run as shapes."""
    all_links = links(run)
    paths = [done.path for done in run if done.report.stage == LEVELS[0]]
    rows = {done.node: done.report.counts.rows_in + done.report.counts.added for done in run}
    widest = max(sum(n for (stage, _), n in rows.items() if stage == level) for level in LEVELS)
    scale = (100 - GAP * (len(paths) - 1)) / max(widest, 1)
    left, used = {}, dict.fromkeys(LEVELS, 0.0)
    for node, count in rows.items():
        left[node] = used[node[0]]
        used[node[0]] += count * scale + GAP
    entry = dict(left)  # where the next link comes in
    shapes = []

    def draw(kind: str, x: float, new_x: float, count: int, y: float, new_y: float, colour: str, title: str) -> None:
        shapes.append(Shape(kind, _ribbon(x, new_x, max(count * scale, THINNEST), y, new_y), colour, title))

    for node, count in rows.items():
        stage, path = node
        x, bottom = left[node], LEVELS.index(stage) * LEVEL + NODE
        colour = f"s{paths.index(path) % COLOURS}" if path else "all"
        draw("node", x, x, count, bottom - NODE, bottom, colour, f"{stage} {path}: {count:,} rows")
        for link in (link for link in all_links if link.source == node):
            if link.target:
                title = f"{stage} {path} to {link.target[0]}: {link.rows:,} rows"
                draw("link", x, entry[link.target], link.rows, bottom, bottom + LEVEL - NODE, colour, title)
                entry[link.target] += link.rows * scale
        end = x + max(count * scale, THINNEST)
        lost = [link for link in all_links if link.source == node and not link.target and link.what != "packed"]
        for kind in ("lost", "dropped"):
            reasons = {link.what: link.rows for link in lost if (link.what == "dropped") == (kind == "dropped")}
            if fallen := sum(reasons.values()):
                title = ", ".join(f"{reason}: {number:,}" for reason, number in reasons.items())
                end -= max(fallen * scale, THINNEST)
                draw("falls", end, end, fallen, bottom, bottom + LEVEL * 0.6, kind, title)
        for link in (link for link in all_links if link.target == node and link.what == "added"):
            start = x + (count - link.rows) * scale
            draw(
                "rises", start, start, link.rows, bottom - LEVEL * 0.6, bottom - NODE, "added", f"added: {link.rows:,}"
            )
    return shapes


def _ribbon(left: float, new_left: float, width: float, top: float, bottom: float) -> str:
    """Return the SVG path of a band from (left, top) to (new_left, bottom), vertical at both ends."""
    middle, right, new_right = (top + bottom) / 2, left + width, new_left + width
    return (
        f"M{left:.3f} {top:.1f}C{left:.3f} {middle:.1f} {new_left:.3f} {middle:.1f} {new_left:.3f} {bottom:.1f}"
        f"H{new_right:.3f}C{new_right:.3f} {middle:.1f} {right:.3f} {middle:.1f} {right:.3f} {top:.1f}z"
    )


def write_index(output: Folder, run: Sequence[Done]) -> None:
    """Write index.html of a recipe's run into its output."""
    levels = [(level, [done.report.counts for done in run if done.report.stage == level]) for level in LEVELS]
    height = (len(LEVELS) - 1) * LEVEL + NODE
    page = render(
        "index.html", name=output.name, run=run, levels=levels, shapes=sankey(run), height=height, level_height=LEVEL
    )
    output.write(INDEX, page.encode())
