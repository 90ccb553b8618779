"""Put the demo's result together: check it, print the table, write demo/result.json. Exit code 1 if something is wrong.

usage: result.py DEMO
example: python jobs/demo/result.py demo
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kanyun.manifest import Manifest
from kanyun.naming import discover

# Before torch starts: logits are compared in float32, on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

ACCURACY = 0.90  # at least
LOGIT_DIFFERENCE = 1e-4  # at most, in float32

Place = tuple[str, str, int]  # dataset, file, position


def quarantined(pipeline: Path) -> dict[Place, str]:
    """Every row in a quarantine/ of the pipeline's stages -> its reason."""
    found = {}
    for folder in sorted([*pipeline.glob("filter/*/quarantine"), pipeline / "build/quarantine"]):
        for row in pq.read_table(folder, columns=["dataset", "file", "position", "reason"]).to_pylist():
            # Up to `filter` the column names the dataset class, from `sample` on the data path.
            dataset = row["dataset"] if folder.parent.name == "build" else folder.parent.name
            found[dataset, row["file"], row["position"]] = row["reason"]
    return found


def planted(raw: Path) -> dict[Place, str]:
    rows = json.loads((raw / "planted.json").read_text())
    return {(row["folder"], row["file"], row["position"]): row["reason"] for row in rows}


def faults(result: dict[str, Any], found: dict[Place, str], expected: dict[Place, str]) -> list[str]:
    """Return a sentence for each thing that is wrong."""
    wrong = [
        f"{place}: planted as {expected.get(place, 'a good row')}, found as {found.get(place, 'a good row')}"
        for place in sorted(found.keys() | expected.keys())
        if found.get(place) != expected.get(place)
    ]
    if result["rows_in"] != result["rows_packed"] + sum(result["quarantined"].values()):
        wrong.append(f"{result['rows_in']} rows in are not those packed and quarantined")
    if result["accuracy"] < ACCURACY:
        wrong.append(f"accuracy is {result['accuracy']:.3f}, at least {ACCURACY} is asked for")
    if not result["max_logit_diff"] <= LOGIT_DIFFERENCE:
        wrong.append(f"a logit differs by {result['max_logit_diff']:.2e}, at most {LOGIT_DIFFERENCE:.0e} is allowed")
    return wrong


def collect(demo: Path) -> dict[str, Any]:
    from convert.logits import compare

    score = json.loads((demo / "score.json").read_text())
    manifest = Manifest.load(discover(str(demo / "pipeline/packed"))[0])
    packing = json.loads(next((demo / "pipeline/packed").glob("packed_*/report.json")).read_text())
    steps = [json.loads(line) for line in (demo / "train/metrics.jsonl").read_text().splitlines()]
    _, comparison = compare(demo / "train", demo / "hf")
    return {
        "accuracy": score["accuracy"],
        "max_logit_diff": comparison.difference.max().item(),
        "rows_in": packing["since_raw"]["rows_in"],
        "rows_packed": manifest.counts.packed,
        "quarantined": packing["since_raw"]["quarantined"],
        "packs": manifest.packs,
        "fill": round(manifest.fill, 4),
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "validation_loss_last": steps[-1]["validation_loss"],
        "steps": len(steps),
    }


def table(demo: Path, result: dict[str, Any]) -> str:
    bad = result["quarantined"]
    lines = {
        "rows in": f"{result['rows_in']:,} = {result['rows_packed']:,} packed + {sum(bad.values())} quarantined",
        **{f"  {reason}": str(rows) for reason, rows in bad.items()},
        "packs": f"{result['packs']} of 1,024 tokens, {result['fill']:.1%} full",
        "training": f"{result['steps']} steps, loss {result['loss_first']:.3f} -> {result['loss_last']:.3f}"
        f" (validation {result['validation_loss_last']:.3f})",
        "held-out accuracy": f"{result['accuracy']:.1%}, answered by transformers alone",
        "logit difference": f"{result['max_logit_diff']:.1e} at most, between our model and transformers",
        "model": str(demo / "hf"),
        "packs drawn": str(demo / "preview.html"),
        "stage reports": str(demo / "pipeline/*/*/report.html"),
        "training curves": str(demo / "train/report.html"),
        "this table": str(demo / "result.json"),
    }
    return "\n".join(f"  {name:22} {value}" for name, value in lines.items())


def main(demo: Path) -> int:
    result = collect(demo)
    (demo / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + table(demo, result) + "\n")
    wrong = faults(result, quarantined(demo / "pipeline"), planted(demo / "raw"))
    for sentence in wrong:
        print(f"wrong: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
