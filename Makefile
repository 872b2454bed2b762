# Everything runs from a fresh clone with git, make and Python 3.11+; the virtual environment is made on demand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The tests wait more than they compute, hence more workers than cores.
PYTEST_WORKERS ?= 4
SEEDS ?= 50000

PEERS := benchmarks/peers
PEER_STAMPS := $(PEERS)/.venv-huey/.installed $(PEERS)/.venv-celery/.installed

# The steps of a target run in order, whatever -j says: `make test` must end with pytest's summary.
.NOTPARALLEL:
.PHONY: help install lint docs docs-generate docs-serve conformance wheel bench bench-smoke bench-peers unit test demo simulate clean

help:
	@echo "make test         all checks and tests, as CI runs them"
	@echo "make demo         the demonstration: count the standard library's functions with two worker processes"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make unit         pytest alone"
	@echo "make conformance  run the kits over our plugins, and write down what they prove"
	@echo "make docs         build the documentation into site/ and check it"
	@echo "make bench        all benchmarks, peers included"
	@echo "make simulate     50,000 seeds of the deterministic simulation (SEEDS=n)"
	@echo "make clean        remove what was built, the environments included"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml scripts/make_venv.sh
	sh scripts/make_venv.sh "$(PYTHON)" $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,docs]"
	@touch $@

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: install
	$(BIN)/python scripts/generate_docs.py --check
# Not --quiet: it would hide the warnings from --strict, which then passes
	$(BIN)/mkdocs build --strict
	$(BIN)/python scripts/check_docs.py

docs-generate: install
	$(BIN)/python scripts/generate_docs.py

docs-serve: install
	$(BIN)/mkdocs serve

wheel: install
	$(BIN)/python scripts/check_wheel.py
	$(BIN)/python scripts/check_plugin.py

bench-smoke: install
	$(BIN)/python -m benchmarks --smoke

bench: install bench-peers
	$(BIN)/python -m benchmarks

bench-peers: $(PEER_STAMPS)

$(PEERS)/.venv-%/.installed: $(PEERS)/%.txt scripts/make_venv.sh
	sh scripts/make_venv.sh "$(PYTHON)" $(PEERS)/.venv-$*
	$(PEERS)/.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# What ships as dray/testing/conformance.json: `dray plugins --conformance` shows it.
conformance: install
	rm -f dray/testing/conformance.json
	DRAY_CONFORMANCE_REPORT=dray/testing/conformance.json $(BIN)/python -m pytest -n $(PYTEST_WORKERS) -q -r f \
		tests/test_conformance_transports.py tests/test_conformance_backends.py \
		tests/test_serializers.py tests/test_conformance_signed.py tests/test_compressors.py tests/test_pools.py

unit: install
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

test: lint docs wheel bench-smoke unit

demo: install
	$(BIN)/dray demo

# Slow proofs, beside `make test`
simulate: install
	$(BIN)/python -m dray.testing.simulation --seeds $(SEEDS)

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache $(PEERS)/.venv-*
	rm -rf $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
