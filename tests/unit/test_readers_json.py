"""The reader of .json: an array, an object over several lines, or lines after all."""

import json
from pathlib import Path

import pytest

from pipeline.checks import RowError
from pipeline.readers import RawRow
from tests.support.raw_rows import COMPRESS, rows_of


def json_rows(tmp_path: Path, data: bytes, name: str = "a.json") -> list[RawRow]:
    (tmp_path / name).write_bytes(data)
    return rows_of(tmp_path / name, step=7)


def test_an_array_is_its_elements(tmp_path: Path) -> None:
    """Also without a line break, after a byte order mark, in a compressed file, and across many reads."""
    elements = [{"text": '[1, 2] \\ " } é 😀'}, {"text": "x" * 9_000_000}, {"nested": [{"a": [1, {}]}]}, {"text": ""}]
    for data in (
        json.dumps(elements, ensure_ascii=False).encode(),
        b"\xef\xbb\xbf \n" + json.dumps(elements, indent=1).encode() + b"\n",
    ):
        rows = json_rows(tmp_path, data)
        assert [(row.position, row.fields) for row in rows] == list(enumerate(elements))
        assert [json.loads(row.raw) for row in rows] == elements
        for suffix, compress in COMPRESS.items():
            assert [row.fields for row in json_rows(tmp_path, compress(data), f"a.json.{suffix}")] == elements
    assert json_rows(tmp_path, b"[]") == []
    joined = json_rows(tmp_path, b'[{"a": 1}]\n\xef\xbb\xbf[]\n[{"a": 2}, {"a": 3}]\n')
    assert [(row.position, row.fields) for row in joined] == [(n, {"a": n + 1}) for n in range(3)]
    assert json_rows(tmp_path, b"") == []


@pytest.mark.parametrize(
    ("data", "good", "says"),
    [
        (b'[{"a": 1}, {"a": 2}', 2, "the array is not closed after 2 rows"),
        (b'[{"a": 1}] {"a": 2}', 1, "behind 1 rows the array ends, not the file"),
        (b'[{"a": 1}, {"a": 2},', 2, "no JSON from row 2 of the array on"),
        (b'[{"a": 1} {"a": 2}]', 1, "the array is not closed after 1 rows"),
        (b'[{"a": 1}, {"a": "cut', 1, "no JSON from row 1 of the array on"),
        (b'[{"a": 1}, {"a": nope}, {"a": 3}]', 1, "no JSON from row 1 of the array on"),
        (b"[", 0, "the array is not closed after 0 rows"),
        (b"[" * 100_000, 0, "no JSON from row 0"),
    ],
)
def test_a_damaged_array_keeps_what_is_before(data: bytes, good: int, says: str, tmp_path: Path) -> None:
    *rows, last = json_rows(tmp_path, data)
    assert [row.fields for row in rows] == [{"a": n + 1} for n in range(good)]
    assert isinstance(last.fields, RowError)
    assert (last.position, says in last.fields.evidence) == (good, True), last.fields.evidence


def test_elements_that_are_no_rows_cost_themselves_alone(tmp_path: Path) -> None:
    rows = json_rows(tmp_path, b'[1234, "x", {"a": "\xff"}, {"a": 1}]')
    assert [row.position for row in rows] == [0, 1, 2, 3]
    assert [isinstance(row.fields, RowError) for row in rows] == [True, True, False, False]
    assert rows[2].fields == {"a": "\udcff"}  # no text: whoever hashes the row refuses it
    assert rows[2].raw == '{"a": "\\udcff"}'


def test_one_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x"}], "images": []}
    assert [r.fields for r in json_rows(tmp_path, json.dumps(row, indent=2).encode())] == [row]
    broken_first = b'{broken\n{"a": 1}\n{"a": 2}\n'
    first, *rest = json_rows(tmp_path, broken_first)
    assert isinstance(first.fields, RowError)
    assert [r.fields for r in rest] == [{"a": 1}, {"a": 2}]
    one_a_line = b'{\n "messages": [\n  {"role": "user"},\n  {"role": "assistant"}\n ]\n}\n'
    assert [r.fields for r in json_rows(tmp_path, one_a_line)] == [
        {"messages": [{"role": r} for r in ("user", "assistant")]}
    ]
    (cut,) = json_rows(tmp_path, b'{\n "a": 1,\n "b"')
    assert isinstance(cut.fields, RowError)


def test_objects_one_after_another(tmp_path: Path) -> None:
    """As jq prints them, with a byte order mark and without a line break between them."""
    text = '{\n  "a": 1\n}\n\ufeff{\n  "a": "é"\n}{"a": [{}]}\n'
    rows = json_rows(tmp_path, text.encode())
    assert [(row.position, row.fields) for row in rows] == [(0, {"a": 1}), (1, {"a": "é"}), (2, {"a": [{}]})]
    *rows, last = json_rows(tmp_path, (text + '{\n "a": nope\n}').encode())
    assert len(rows) == 3
    assert isinstance(last.fields, RowError)
    assert (last.position, "no JSON from row 3 of the file on" in last.fields.evidence) == (3, True)
