"""What bounds the card while a command runs: its clocks, power and temperature, and why it does not clock higher.

usage: python benchmarks/clocks.py OUT.csv -- python benchmarks/train_text.py DATA --models 1.5B --ours-only --steps 8
Runs the command and nvidia-smi beside it, ten samples a second into OUT.csv. Prints the median of those during which
the GPU was busy, and the share of them with each reason: "power cap" means that fewer bytes or operations are the
only way to be faster, "idle" or none that the clock is as high as it goes.
"""

import csv
import subprocess
import sys
from pathlib import Path
from statistics import median

from kanyun.cli.parser import Parser

FIELDS = ("clocks.sm", "clocks.mem", "power.draw.instant", "power.limit", "temperature.gpu", "temperature.memory")
BUSY = "utilization.gpu"
REASONS = {  # bits of clocks_event_reasons.active, by NVML
    0x1: "idle",
    0x2: "clocks set by an application",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, by software",
    0x40: "thermal, by hardware",
    0x80: "power brake",
}
QUERY = (*FIELDS, BUSY, "clocks_event_reasons.active")


def summary(samples: list[list[str]]) -> str:
    """A table of the samples with the GPU at work; rows as nvidia-smi writes them, in the order of QUERY."""
    busy = [row for row in samples if len(row) == len(QUERY) and row[len(FIELDS)].isdecimal()]
    busy = [row for row in busy if int(row[len(FIELDS)]) >= 95]
    if not busy:
        return f"the GPU was never busy in {len(samples)} samples"
    lines = [f"| of {len(busy)} samples | median | least | most |", "|---|--:|--:|--:|"]
    for column, name in enumerate(FIELDS):
        values = [float(row[column]) for row in busy if row[column].replace(".", "").isdecimal()]
        if values:
            lines.append(f"| {name} | {median(values):.0f} | {min(values):.0f} | {max(values):.0f} |")
    for bit, reason in REASONS.items():
        share = sum(bool(int(row[-1], 16) & bit) for row in busy) / len(busy)
        if share:
            lines.append(f"| held back by: {reason} | {share:.0%} | | |")
    return "\n".join(lines)


def main(out: Path, command: list[str]) -> int:
    query = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", "-lms", "100"]
    with out.open("w") as file:
        sampler = subprocess.Popen(query, stdout=file)
        try:
            code = subprocess.run(command, check=False).returncode
        finally:
            sampler.terminate()
            sampler.wait()
    with out.open() as file:
        print(summary([[cell.strip() for cell in row] for row in csv.reader(file)]))
    return code


if __name__ == "__main__":
    parser = Parser(
        description=__doc__,
        example="python benchmarks/clocks.py clocks.csv -- python benchmarks/train_text.py DATA --ours-only",
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    sys.exit(main(args.out, args.command))
