"""Sampling as a pure function: copies over the epochs, of each sample and in total. Spark has integration tests."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kanyun.errors import UserError
from pipeline.ratios import ratio_of, ratios_for, read_ratios
from pipeline.stages.sample import copies_before

ratios = st.fractions(0, 5, max_denominator=1000)


@given(ratios, st.integers(1, 60), st.integers(0, 30))
def test_totals_are_exact_and_each_sample_within_one_copy(ratio: Fraction, count: int, epochs: int) -> None:
    copies = [copies_before(rank, count, ratio, epochs) for rank in range(count)]
    assert sum(copies) == int(count * epochs * ratio)
    assert all(abs(n - epochs * ratio) < 1 for n in copies)


@given(ratios, st.integers(1, 60), st.integers(0, 30))
def test_an_epoch_differs_by_one_copy_at_most(ratio: Fraction, count: int, epoch: int) -> None:
    used = {copies_before(k, count, ratio, epoch + 1) - copies_before(k, count, ratio, epoch) for k in range(count)}
    assert used <= {int(ratio), int(ratio) + 1}


@given(st.fractions("0.1", 1, max_denominator=1000), st.integers(1, 60))
def test_from_a_tenth_on_all_had_their_turn_after_ten_epochs(ratio: Fraction, count: int) -> None:
    assert all(copies_before(rank, count, ratio, 10) >= 1 for rank in range(count))


def test_ratios_are_exact_as_written() -> None:
    assert ratio_of("a", 0.1) == Fraction(1, 10)
    assert ratio_of("a", "1/3") == Fraction(1, 3)
    assert ratio_of("a", 1 / 3) == Fraction(1, 3)
    for wrong in (-1, "half", None, float("nan"), float("inf"), 1001, "1/0"):
        with pytest.raises(UserError, match="ratio of a is"):
            ratio_of("a", wrong)


def test_every_path_has_a_ratio() -> None:
    assert ratios_for(["a", "b/c"], {}) == {"a": 1, "b/c": 1}
    assert ratios_for(["a"], {"a": 0, "z": 2}) == {"a": 0}
    with pytest.raises(UserError, match=r"path \. \(the input itself is one output of filter: name it `\.`"):
        ratios_for(["."], {"charts": 0.5})
    with pytest.raises(UserError, match=r"data path b/c; ratios are known for a: 1, z: 2"):
        ratios_for(["a", "b/c"], {"a": 1, "z": 2})


def test_ratio_files(tmp_path: Path) -> None:
    file = tmp_path / "ratios.yaml"
    with pytest.raises(UserError, match="there is no file"):
        read_ratios(str(file))
    for wrong, sentence in (
        ("a: [", "is not YAML"),
        ("- a\n- b\n", "data path: ratio"),
        ("", "data path: ratio"),
        ("a: 1\nb: 2\na: 3\n", "key 'a' occurs twice"),
        ("[a, b]: 1\n", "a key must be text"),
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match=sentence):
            read_ratios(str(file))
    file.write_text("web/a: 0.5\n1: 2\n")
    assert read_ratios(str(file)) == {"web/a": 0.5, "1": 2}
    file.write_text("no: 0.5\n010: 2\n1.0: 1\n~: 1e-7\n2026-11-27: 3e2\n")
    assert read_ratios(str(file)) == {"no": 0.5, "010": 2, "1.0": 1, "~": 1e-7, "2026-11-27": 300.0}, "keys as text"
    file.write_text("usual: &usual {a: 1, b: 2}\nmine: {<<: *usual, b: 3}\n")
    assert read_ratios(str(file))["mine"] == {"a": 1, "b": 3}


def test_tiny_ratios_are_exact_or_refused() -> None:
    assert ratio_of("a", 1e-7) == Fraction(1, 10**7)
    assert ratio_of("a", "1e-9") == Fraction(1, 10**9)
    with pytest.raises(UserError, match="ratio of a is 1e-10, under one row of 10"):
        ratio_of("a", 1e-10)
