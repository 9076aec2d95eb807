"""Tables for spreadsheets: RFC 4180, and nothing in them that such a program would run."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.own import csv_text


def cell(value: Any) -> str:
    (row,) = list(csv.reader(io.StringIO(csv_text(["a"], [{"a": value}]), newline="")))[1:]
    return row[0]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-x", "@SUM(A1)", "\t=1", "\r=1", "=", "-1+1"])
def test_what_would_be_run_is_text(text: str) -> None:
    assert cell(text) == f"'{text}"


@pytest.mark.parametrize(
    "value", [-5, 0, 7, "-0.2", "-5", "12.0001", "/v1?a=1", "a=1", "0x=", " ="]
)
def test_everything_else_stays_as_it_is(value: object) -> None:
    assert cell(value) == str(value)


def test_lines_and_columns() -> None:
    rows: list[dict[str, Any]] = [
        {"b": 'say "no", twice', "a": None, "c": "not shown"},
        {"a": 1, "b": "é\n"},
    ]
    assert csv_text(["a", "b"], rows) == 'a,b\r\n,"say ""no"", twice"\r\n1,"é\n"\r\n'


@given(st.text())
def test_no_cell_begins_like_a_formula_but_a_number(text: str) -> None:
    shown = cell(text)
    assert shown in (text, f"'{text}")
    if shown[:1] in ("=", "+", "-", "@", "\t", "\r"):
        float(shown)
