"""python -m trainer.checkpoint list RUN | verify RUN"""

import argparse
import sys

from kanyun.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.checkpoint", description="Look at a run's checkpoints.")
    parser.add_argument("action", choices=["list", "verify"], help="sizes alone, or every byte and value")
    parser.add_argument("run", help="a run's output folder, or one step_... folder; local or hdfs://")
    args = parser.parse_args()
    from trainer.checkpoint.verify import faults, list_steps, steps_below

    if args.action == "list":
        for listed in list_steps(args.run):
            print(listed.line())
        return 0
    damaged = 0
    for step in steps_below(args.run):
        found = faults(step)
        for fault in found:
            print(f"error: {fault}", file=sys.stderr)
        damaged += bool(found)
        print(f"{step.name}  {'DAMAGED' if found else 'every file and value is right'}", flush=True)
    return 2 if damaged else 0


if __name__ == "__main__":
    run_cli(main)
