"""The page of one run, or of several over one another: which charts there are, and what stands above them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer.report.charts import Chart, Line, text
from trainer.report.history import History

PAGE = "report.html"
# key in metrics.jsonl, title, unit, logarithmic, from zero
_CHARTS = (
    ("lr", "learning rate", "", False, True),
    ("grad_norm", "gradient norm", "before clipping", True, False),
    ("tokens_per_second", "tokens/s", "useful ones, all GPUs", False, True),
    ("mfu", "MFU", "share of the GPUs' peak", False, True),
    ("data_wait", "data wait", "share of the step, longest of the ranks", False, True),
    ("memory_gb", "memory", "GB, peak of rank 0", False, True),
    ("work_seconds", "slowest rank", "seconds by itself", False, True),
    ("imbalance", "cost of the ranks' packs", "largest / mean", False, False),
    ("seconds", "time of a step", "seconds", False, True),
)
_EVENTS = {
    "start": "the run was started or resumed",
    "save": "a checkpoint was begun",
    "save failed": "the checkpoint before was not written",
    "stop": "told to stop",
    "skipped": "the step was skipped: its gradient was not finite",
}


def write_report(paths: Sequence[str], out: str | None = None) -> str:
    """Draw the runs into `out`, or one run into its own folder; return where.

    Raises UserError if there are several runs and no `out`, or a run has no step yet.
    """
    if len(paths) > 1 and out is None:
        raise UserError("several runs are drawn into one file: name it with --out FILE.html")
    text = page([History.read(path) for path in paths]).encode()
    file = Folder(out) if out else Folder(paths[0]) / PAGE
    file.parent.write(file.name, text)
    return file.path


def page(runs: Sequence[History]) -> str:
    """Return the HTML of a report: one file that needs no network, and scripts only for values beside the pointer."""
    names = _short_names([run.name for run in runs])
    charts = list(_charts(runs, names))
    return _template().render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        runs=[{"name": name, "path": run.name, **_summary(run)} for name, run in zip(names, runs, strict=True)],
        differences=_differences(runs),
        config={} if len(runs) > 1 else runs[0].config,
        charts=charts,
        kinds={kind: _EVENTS[kind] for kind in _EVENTS if any(m.kind == kind for c in charts for m in c.marks)},
        data=json.dumps([chart.data() for chart in charts], ensure_ascii=False).replace("<", "\\u003c"),  # no </script>
    )


def _charts(runs: Sequence[History], names: Sequence[str]) -> list[Chart]:
    last = max(run.last["step"] for run in runs)
    events = [
        (step, kind, f"step {step:,}: {_EVENTS[kind]}" + (f" ({name})" if len(runs) > 1 else ""))
        for run, name in zip(runs, names, strict=True)
        for step, kind in run.events
        if kind in _EVENTS
    ]
    charts: list[Chart] = []

    def add(title: str, unit: str, lines: list[Line], log: bool = False, zero: bool = False) -> None:
        if any(line.points for line in lines):
            charts.append(Chart.of(title, unit, lines, events, last=last, log=log, zero=zero))

    def of_runs(key: str, dataset: str | None = None, dots: bool = False) -> list[Line]:
        curves = [run.column(key, dataset).curve() for run in runs]
        return [Line(name, n, curve, dots) for n, (name, curve) in enumerate(zip(names, curves, strict=True))]

    several, datasets = len(runs) > 1, sorted({name for run in runs for name in run.datasets})
    if several:
        held_out = [replace(line, name=f"{line.name} held-out") for line in of_runs("validation_loss", dots=True)]
        add("loss", "mean over trained tokens", of_runs("loss") + held_out, log=True)
    else:
        trained, unseen = runs[0].column("loss").curve(), runs[0].column("validation_loss").curve()
        both = [Line("trained on", 0, trained), Line("held-out", 1, unseen, dots=True)]
        add("loss", "mean over trained tokens", both, log=True)
    for key, title, dots in (("loss_by_dataset", "loss", False), ("validation_loss_by_dataset", "held-out loss", True)):
        if several:
            for dataset in datasets:
                add(f"{title} of {dataset}", "", of_runs(key, dataset, dots), log=True)
        else:
            curves = [runs[0].column(key, dataset).curve() for dataset in datasets]
            lines = [Line(name, n, curve, dots) for n, (name, curve) in enumerate(zip(datasets, curves, strict=True))]
            add(f"{title} by dataset", "", lines, log=True)
    for key, title, unit, log, zero in _CHARTS:
        add(title, unit, of_runs(key), log, zero)
    return charts


def _summary(run: History) -> dict[str, Any]:
    """The last values of a run; of what varies from step to step, the mean of the last twentieth of its steps."""
    held_out = run.column("validation_loss").values
    steps = run.last.get("steps")
    recent = {key: run.recent(key) for key in ("loss", "tokens_per_second", "mfu", "data_wait", "memory_gb")}
    return {
        "step": f"{run.last['step']:,}" + (f" of {steps:,}" if steps else ""),
        "loss": _known(recent["loss"]),
        "held-out loss": _known(held_out[-1] if held_out else None),
        "lowest held-out": _known(min(held_out, default=None)),
        "tokens/s": _known(recent["tokens_per_second"]),
        "MFU": "not known" if recent["mfu"] is None else f"{recent['mfu']:.1%}",
        "data wait": "not known" if recent["data_wait"] is None else f"{recent['data_wait']:.1%}",
        "memory": "not known" if recent["memory_gb"] is None else f"{recent['memory_gb']:.1f} GB",
    }


def _known(value: float | None) -> str:
    return "none" if value is None else text(value)


def _differences(runs: Sequence[History]) -> dict[str, list[str]]:
    """Return the keys of the config in which runs differ, each with every run's value."""
    keys = [key for run in runs for key in run.config]
    values = {key: [str(run.config.get(key)) for run in runs] for key in dict.fromkeys(keys)}
    return {key: of_runs for key, of_runs in values.items() if len(set(of_runs)) > 1}


def _short_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths that tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({number + 1})" for number, path in enumerate(paths)]  # a run given twice


@lru_cache(maxsize=1)
def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("trainer.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("template.html")
