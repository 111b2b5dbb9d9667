# Everything runs in .venv, which each target sets up as far as it needs. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# torch's build: empty takes your package index's default; for the CPU build on Linux use
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# and for CUDA an index such as https://download.pytorch.org/whl/cu128
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location
TORCH := $(shell grep -E '^torch==' requirements.lock)
SDKS := 5.9.0 4.3.1
CHECKOV := checkov==3.3.30

# Tests wait for real processes more than they compute, so that a few more run at once than there are cores.
TEST_PROCESSES ?= 3

.PHONY: help setup demo up test lint format proto docs chart bench chaos lock clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1	\2/' | expand -t 16

setup: $(VENV)/.test ## Create .venv with everything for development and tests

demo: $(VENV)/.run ## Start everything, change the sample dog to a lion (lion.png), stop everything
	@$(BIN)/img2img demo --image examples/dog.png --output lion.png

up: $(VENV)/.run ## Run the whole service on this machine until Ctrl-C
	@$(BIN)/img2img up

test: $(VENV)/.test ## Run all tests
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(TESTS)

lint: $(VENV)/.test ## Check style, types, import contracts and that generated code is fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	@$(MAKE) --no-print-directory PROTO_OUT=$(VENV)/proto-check proto
	@for stubs in img2img/v1 gateway/rpc/externalscaler; do \
		diff -r -x '__init__.py' -x '__pycache__' $(VENV)/proto-check/$$stubs $$stubs || exit 1; done

format: $(VENV)/.test ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PROTO_OUT ?= .
proto: $(VENV)/.test ## Generate the gRPC stubs from proto/
	@mkdir -p $(PROTO_OUT)
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) \
		--grpc_python_out=$(PROTO_OUT) proto/img2img/v1/img2img.proto
	$(BIN)/python -m grpc_tools.protoc -I gateway/rpc/externalscaler=proto/externalscaler \
		--python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) \
		proto/externalscaler/externalscaler.proto

docs: $(VENV)/.test ## Write the table of metrics in docs/telemetry.md
	$(BIN)/python -m tests.metrics_table

chart: $(VENV)/.test ## Write what the chart in helm/ has from elsewhere: README, schema of the settings, alerts, dashboard
	$(BIN)/python helm/chart.py

bench: $(VENV)/.test ## Run the benchmarks (BENCH=queue for one, QUICK=1 for a short run)
	@for name in $(or $(BENCH),gateway queue queue_scale cancel eta autoscale engine proxy tracing); do $(BIN)/python bench/$$name.py $(if $(QUICK),--quick); done

CHAOS_SECONDS ?= 600
CHAOS_SEED ?= 7
chaos: $(VENV)/.test ## Run the fault test (CHAOS_SECONDS=600 CHAOS_SEED=7)
	@$(BIN)/python -m tests.chaos.run --seconds $(CHAOS_SECONDS) --seed $(CHAOS_SEED)

lock: ## Resolve the dependencies anew into requirements.lock
	@rm -rf $(VENV)/lock && $(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(VENV)/lock/bin/pip install --quiet -e '.[dev]'
	$(VENV)/lock/bin/pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' > requirements.lock

clean: ## Delete .venv and caches
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: what is installed so far. torch comes first and from its own index, so that nothing else picks a build.
$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: install one, or set PYTHON=" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python requirements.lock
	@echo "Installing $(TORCH)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "Installing img2img"
	@$(PIP) -c requirements.lock -e '.[local]'
	@touch $@

# Helm and checkov stand apart: the one is no package for Python, the other pins what others need newer.
$(VENV)/.test: $(VENV)/.run helm/binaries.txt
	@echo "Installing what development and tests need"
	@$(PIP) -c requirements.lock -e '.[dev]'
	@for version in $(SDKS); do \
		$(PIP) -c requirements.lock --upgrade --target $(VENV)/sdk/cloudflare-$$version cloudflare==$$version; done
	@$(BIN)/python helm/binaries.py $(VENV)/helm
	@$(PYTHON) -m venv $(VENV)/checkov
	@$(VENV)/checkov/bin/pip install --quiet --disable-pip-version-check '$(CHECKOV)'
	@touch $@
