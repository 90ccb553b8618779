"""Sampling ratios: copies of each sample an epoch, by data path."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from kanyun.errors import UserError
from pipeline.yaml_file import load_yaml

MOST = 1000
# Ranks times denominators fit 64 bits for data paths of up to 4 billion rows.
MOST_DENOMINATOR = 10**9


def read_ratios(file: str) -> dict[str, Any]:
    """Return a YAML file of `data path: ratio`. Raises UserError if it is not there or is something else."""
    table = load_yaml(file, "file of ratios (`data path: ratio` lines)")
    if not isinstance(table, dict) or not table:
        raise UserError(f"{file} holds no ratios: write one `data path: ratio` a line")
    return table


def ratios_for(paths: Sequence[str], table: Mapping[str, Any]) -> dict[str, Fraction]:
    """Return the ratio of each data path; with an empty table, 1.

    Raises UserError if the table has ratios, but not for all paths.
    """
    missing = [path for path in paths if path not in table]
    if table and missing:
        known = ", ".join(f"{path}: {ratio}" for path, ratio in sorted(table.items()))
        single = " (the input itself is one output of filter: name it `.`, or by its folder)" if "." in missing else ""
        raise UserError(
            f"no sampling ratio for data path {', '.join(missing)}{single}; ratios are known for {known}: "
            "add the missing ones (0 leaves a path out)"
        )
    return {path: ratio_of(path, table.get(path, 1)) for path in paths}


def ratio_of(path: str, value: Any) -> Fraction:
    """Return a ratio exactly as written: 0.1 is 1/10. Denominators go up to 10^9, so 0.3333333333 is 1/3.

    Raises UserError if it is not a number from 0 to 1000, or so small that it would become 0.
    """
    try:
        exact = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        exact = Fraction(-1)
    ratio = exact.limit_denominator(MOST_DENOMINATOR)
    if not 0 <= exact <= MOST:
        raise UserError(f"the sampling ratio of {path} is {value!r}, not a number from 0 to {MOST}: correct it")
    if exact and not ratio:
        raise UserError(f"the sampling ratio of {path} is {value!r}, under one row of 10^9: give 0, or 1e-9 and more")
    return ratio
