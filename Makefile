# Everything runs from a fresh clone with git, make and Python 3.11+; the virtual environment is made on demand.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The tests wait more than they compute, hence more workers than cores.
PYTEST_WORKERS ?= 4
SEEDS ?= 50000

# Where the figures of bench-brokers go, and where the chart finds them
BROKERS_JSON ?= benchmarks/brokers.json

PEERS := benchmarks/peers
PEER_NAMES := celery dramatiq huey rq saq taskiq
PEER_STAMPS := $(PEER_NAMES:%=$(PEERS)/.venv-%/.installed)

# The steps of a target run in order, whatever -j says: `make test` must end with pytest's summary.
.NOTPARALLEL:
.PHONY: help install lint docs docs-generate docs-serve conformance wheel bench bench-brokers bench-chart bench-peers bench-smoke servers unit test test-clusters test-faults test-matrix demo simulate clean

help:
	@echo "make test         all checks and tests, as CI runs them"
	@echo "make demo         the demonstration: count the standard library's functions with two worker processes"
	@echo "make lint         ruff, mypy, import-linter"
	@echo "make unit         pytest alone"
	@echo "make test-clusters  failover of a RabbitMQ cluster of three nodes"
	@echo "make test-matrix  the tests that need servers, against RabbitMQ 4, Redis 8 and Valkey, as root"
	@echo "make conformance  run the kits over our plugins, and write down what they prove"
	@echo "make docs         build the documentation into site/ and check it"
	@echo "make bench        all benchmarks, peers included"
	@echo "make bench-brokers  dray against its peers on RabbitMQ and Redis; then make bench-chart draws it"
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
	$(BIN)/python -m benchmarks brokers --smoke

bench: install bench-peers
	$(BIN)/python -m benchmarks

# RabbitMQ and Redis, dray and its peers in turns, on a quiet machine: 12 minutes
bench-brokers: install bench-peers
	$(BIN)/python -m benchmarks brokers --json $(BROKERS_JSON)

bench-chart: install benchmarks/.venv-chart/.installed
	PYTHONPATH=benchmarks/.venv-chart/site $(BIN)/python -m benchmarks chart $(BROKERS_JSON)

# Beside the environment, not in it: dray needs no matplotlib, nor do its developers
benchmarks/.venv-chart/.installed: benchmarks/chart.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target benchmarks/.venv-chart/site -r $<
	@touch $@

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
		tests/test_conformance_redis.py tests/test_conformance_redis_backend.py \
		tests/test_conformance_rabbitmq.py tests/test_conformance_rabbitmq_backends.py \
		tests/test_serializers.py tests/test_conformance_signed.py tests/test_compressors.py tests/test_pools.py

# RabbitMQ and Redis for the tests, where they are missing and may be installed; the tests start their own
servers:
	sh scripts/install_servers.sh

unit: install servers
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

test: lint docs wheel bench-smoke unit

demo: install
	$(BIN)/dray demo

# Slow proofs, beside `make test`
test-clusters: install servers
	DRAY_TEST_CLUSTERS=1 $(BIN)/python -m pytest -n 2 $(wildcard tests/test_servers.py tests/test_*cluster*.py)

# The kit's connections cut after each single byte of a request and of its answer, not after some: 10 minutes
test-faults: install servers
	DRAY_CONFORMANCE_EXAMPLES=5000 $(BIN)/python -m pytest -n 2 --timeout 900 -k "cut_at or after_a_cut" \
		tests/test_network_kit.py $(wildcard tests/test_conformance_redis*.py tests/test_conformance_rabbitmq*.py)

# The tests that need servers, against newer ones from Debian (SERVERS="sid/rabbitmq trixie/valkey"); as root
test-matrix: install
	sh scripts/matrix.sh $(BIN)/python $(SERVERS)

simulate: install
	$(BIN)/python -m dray.testing.simulation --seeds $(SEEDS)

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .import_linter_cache .hypothesis .pytest_cache $(PEERS)/.venv-* benchmarks/.venv-chart
	rm -rf $(VENV)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
