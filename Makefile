# make demo   set up (once) and run LoRA-One on the bundled model: accuracy before and after, some minutes
# make test   set up (once) and run the tests        make test-slow   whole experiments on real input
# make lint   style                                  make bench       every benchmark, as tables
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# test processes, each with one thread
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-slow lint bench
setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh $(PYTHON) $(VENV)

demo: setup
	$(BIN)/python run_exp.py

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-slow: setup
	$(BIN)/python -m pytest -m slow $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	@for file in benchmarks/bench_*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done
