"""Counters: what stands in the table is counted, over all processes, and nothing else can be."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import observe

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    observe.share(1)
    yield
    observe.share(1)


def value_of(name: str, value: str) -> int:
    return next(n for each, label, n in observe.counted() if (each, label) == (name, value))


def test_each_value_is_counted_apart() -> None:
    observe.count("oddity", kind="meter_foreign")
    observe.count("oddity", kind="meter_foreign")
    observe.count("oddity", kind="meter_malformed")
    assert value_of("oddity", "meter_foreign") == 2
    assert value_of("oddity", "meter_malformed") == 1
    assert value_of("oddity", "other") == 0


def test_what_stands_in_no_table_is_other_and_makes_no_label() -> None:
    before = [(name, value) for name, value, _ in observe.counted()]
    observe.count("oddity", kind='0xdead"} 1\nfarebox_fake 1')
    assert value_of("oddity", "other") == 1
    assert [(name, value) for name, value, _ in observe.counted()] == before


def test_a_name_that_stands_in_no_table_is_a_mistake() -> None:
    with pytest.raises(KeyError):
        observe.count("oddities", kind="other")


def test_all_processes_are_counted_together_and_the_dead_stay_counted() -> None:
    observe.share(3)
    for number in (1, 2, 2):  # the third takes the place of the second
        pid = os.fork()
        if pid == 0:
            observe.be_process(number)
            for _ in range(1000):
                observe.count("oddity", kind="meter_foreign")
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    observe.count("oddity", kind="meter_foreign")
    assert value_of("oddity", "meter_foreign") == 3001


def test_every_call_in_the_code_names_what_the_table_has() -> None:
    wrong = []
    for path in sorted((ROOT / "gateway").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "observe.count"):
                continue
            where = f"{path.relative_to(ROOT)}:{node.lineno}"
            name = ast.literal_eval(node.args[0])
            counter = observe.COUNTERS.get(name)
            if counter is None or [k.arg for k in node.keywords] != [counter.label]:
                wrong.append(where)
                continue
            said = node.keywords[0].value
            if isinstance(said, ast.Constant) and said.value not in counter.values:
                wrong.append(f"{where}: {ast.unparse(said)}")
    assert not wrong


def test_every_counter_has_room_for_what_nobody_thought_of() -> None:
    assert all(observe.OTHER in counter.values for counter in observe.COUNTERS.values())
    assert all(len(counter.values) <= 20 for counter in observe.COUNTERS.values())
