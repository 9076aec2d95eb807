"""The benchmarks' own machinery; what they measure is no test."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from gateway.db import sqlite_path
from tests.bench import flat, parts, run
from tests.bench.__main__ import FIGURES, MEASURED_BY
from tests.bench.report import Run, markdown
from tests.bench.run import Load, median
from tests.bench.sellers import NETWORK
from tests.fixtures_chain import NETWORK as OURS

DOCS = Path(__file__).parent.parent.parent / "docs" / "performance.md"


@pytest.mark.parametrize("is_random", [False, True])
def test_a_full_ledger_could_have_come_about(tmp_path: Path, is_random: bool) -> None:
    """Every audit runs over the copied calls, inside ``filled``; and they can be seen to bite."""
    gateway = flat.filled(tmp_path / "full", 3_000, is_random, lots=20)
    with sqlite3.connect(sqlite_path(gateway.database)) as db:
        assert db.execute("SELECT count(*) FROM hold").fetchone() == (3_001,)
        most = "SELECT max(n) FROM (SELECT count(*) AS n FROM lot GROUP BY account_id)"
        assert db.execute(most).fetchone() == (20,)
        db.execute(
            "UPDATE account SET available = available + 1 WHERE id = (SELECT max(id) FROM account)"
        )
    db.close()
    with pytest.raises(run.BenchFault, match="I1_balance_is_sum"):
        run.check_books(gateway.database)


def test_a_goal_is_met_from_its_side(capsys: pytest.CaptureFixture[str]) -> None:
    given = Run(1, 1)
    given.put("P-spend", 0.5, "x FLOOR", goal=0.45, then=0.6)
    given.put("P-tail", 11, "ms", goal=10, most=True)
    given.put("FLOOR", 20_000, "requests/s")
    assert [line.get("met") for line in given.lines] == [True, False, None]
    assert len(capsys.readouterr().out.splitlines()) == 3
    table = markdown(given, {name: f"run {name}" for name in MEASURED_BY})
    assert "| P-spend | 0.5 x FLOOR | ≥ 0.45, then 0.6 | `run P-spend` |" in table
    assert "| P-tail | 11 ms | ≤ 10 | `run P-tail` |" in table
    assert "| FLOOR | 20000 requests/s |  | `run FLOOR` |" in table
    assert "not idle" not in table
    given.quiet = False
    assert "not idle" in markdown(given, dict.fromkeys(MEASURED_BY, ""))


def test_medians_are_taken_column_by_column() -> None:
    loads = [Load(1, 9, 5, 3), Load(2, 8, 4, 2), Load(3, 7, 6, 1)]
    assert median(loads) == Load(2, 8, 5, 2)


def test_every_figure_has_a_command_and_a_place_in_the_docs() -> None:
    assert set(MEASURED_BY.values()) == set(FIGURES)
    text = DOCS.read_text(encoding="utf-8")
    for figure, by in MEASURED_BY.items():
        assert f"| {figure}" in text
        assert f"`python -m tests.bench {by}`" in text


def test_the_peers_are_asked_for_the_same_network() -> None:
    assert OURS.caip2 == NETWORK


def test_the_parts_can_be_measured() -> None:
    """Each is done for real: a request that is refused ends it."""
    found = dict(parts.figures(2, 1))
    assert list(found) == ["verify", "of it recover", "check_body", "402", "402 as a problem"]
    assert all(microseconds >= 0 for microseconds in found.values())
