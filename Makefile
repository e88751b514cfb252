# `make demo` and `make test` do all the set-up on a machine with Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Every test stands by itself: one process for each core, up to eight.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-slow test-matrix dist-check mutants truth truth-quick lint types docs notebooks \
	bench bench-gpu clean

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

test: lint types docs $(VENV)/.reference
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.reference
	$(PYTEST) -m slow

# A few fast tests with the oldest and newest torch, tensordict and Python. Downloads gigabytes.
test-matrix: | $(BIN)/python
	$(BIN)/python tests/matrix.py

# Builds wheel and sdist, installs each into a clean environment, and tries it there.
dist-check: $(VENV)/.release
	$(BIN)/python tests/dist_check.py

# Breaks the update mathematics in many ways, and writes docs/mutants.md: which test notices what.
mutants: $(VENV)/.reference
	$(BIN)/python tests/mutation/run.py

# Samples losses whose learning coefficients are known, and writes docs/truth.md: an hour on two cores.
# One that was stopped goes on where it was.
truth: $(VENV)/.bench $(VENV)/.reference
	$(BIN)/python benchmarks/truth/run.py

truth-quick: $(VENV)/.bench $(VENV)/.reference
	$(BIN)/python benchmarks/truth/run.py --quick

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.bench $(VENV)/.reference
	$(BIN)/python benchmarks/run.py

bench-gpu: $(VENV)/.bench $(VENV)/.reference
	$(BIN)/python benchmarks/run.py --device cuda

# The examples as notebooks that have run, in notebooks/: some ten minutes.
notebooks: $(VENV)/.notebooks
	$(BIN)/python examples/notebooks.py digits calibrate llc_errors over_training responses

# What `compat` is compared with. It asks for more than its optimizers use: no dependencies.
$(VENV)/.reference: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt devinterp
	touch $@

clean:
	rm -rf $(VENV) .matrix site dist notebooks

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One environment; each target adds the extra it needs.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
