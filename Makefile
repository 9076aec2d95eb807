# make demo     everything on this machine: no accounts, no money
# make test     all tests; make test ARGS="-k name"
# More: install, bench, soak, lint.  PYTHON=…  NODE=wheel  ARGS="…"

ARGS ?=
WORKERS ?= 3
BIN := .venv/bin
export PYTHON NODE

.PHONY: install demo test-environment test bench soak lint lock

install:
	@scripts/install.sh run

demo: install
	@$(BIN)/farebox demo $(ARGS)

test-environment:
	@scripts/install.sh test
	@scripts/system.sh

test: test-environment
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

bench: test-environment
	@scripts/system.sh bench
	@$(BIN)/python -m tests.bench $(ARGS)

soak: test-environment
	@scripts/system.sh soak
	@$(BIN)/python -m tests.soak $(ARGS)
	@$(BIN)/python -m pytest -q -s --sweep-every 1 tests/e2e/test_sweep.py tests/e2e/sweep_sqlite.py

lint: test-environment
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

lock:
	@scripts/lock.sh
