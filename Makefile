# make demo   set up (once) and run LoRA-One on the bundled model: accuracy before and after, some minutes
# make test   set up (once) and run the tests        make test-slow   whole experiments on real input
# make test-long   the longest tests: all published tables in small, more of the real models, hours
# make lint   style                                  make bench       every benchmark, as tables
# make docs   the documentation as a site in site/, in an environment of its own
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := .venv-docs
# test processes, each with one thread
PARALLEL := -n logical --maxprocesses 4 --dist worksteal

.PHONY: setup demo test test-slow test-long lint bench docs
setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt scripts/setup.sh
	@bash scripts/setup.sh $(PYTHON) $(VENV)

demo: setup
	$(BIN)/python run_exp.py

test: setup
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL) --durations=30

test-slow: setup
	$(BIN)/python -m pytest -vv -m "slow and not long" $(PARALLEL) --durations=30

test-long: setup
	$(BIN)/python -m pytest -m long $(PARALLEL)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	@for file in benchmarks/bench_*.py; do echo "$$file"; $(BIN)/python "$$file" || exit 1; done

# without --quiet, which would also hide the warnings from --strict
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" mkdocs build --strict
	$(DOCS)/bin/python scripts/check_site.py site
	@echo "the documentation is in site/index.html; its search needs a server: python -m http.server -d site"

$(DOCS)/installed: pyproject.toml constraints.txt scripts/setup_docs.sh
	@bash scripts/setup_docs.sh $(PYTHON) $(DOCS)
