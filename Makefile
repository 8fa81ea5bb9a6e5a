# Everything a newcomer types. `make` alone lists the targets.
.DEFAULT_GOAL := help
.PHONY: help setup run test campaign cloud-check engines emulator lint bench gpu-check picture lock clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ROOT ?= out
SOURCE ?= auto
ARGS ?=
TESTS ?= cloud
BUCKET ?= digits
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(INSTALLED) ## make .venv with the pinned versions

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "this needs Python 3.11, found $$($(PYTHON) --version); try make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[report,dev]'
	@touch $@

run: $(INSTALLED) ## run the whole job: preprocess, train, evaluate, gate (SOURCE=auto ROOT=out ARGS=)
	@$(BIN)/python -m pipeline.retrain --root '$(ROOT)' --source '$(SOURCE)' $(ARGS)

test: $(INSTALLED) ## run the default tests, offline
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

campaign: $(INSTALLED) ## run the long series of tests (SHARE=2 runs two cases of each)
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m 'campaign and not cloud' $(if $(SHARE),--share $(SHARE))

cloud-check: $(INSTALLED) ## install the cloud extra and a Cloud Storage in memory, and run what needs them (go)
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[report,cloud,dev]'
	$(BIN)/python tests/engines/install.py emulator
	$(BIN)/pytest --numprocesses 2 --dist loadfile -m '$(TESTS)' $(if $(SHARE),--share $(SHARE))

engines: $(INSTALLED) ## install Prism and Flink, and show that they write the same bytes (go, java, mvn)
	$(BIN)/python tests/engines/install.py prism flink
	$(BIN)/pytest -m campaign tests/test_engines.py

emulator: $(INSTALLED) ## run a Cloud Storage in memory at STORAGE_EMULATOR_HOST, for gs://BUCKET (needs go)
	@$(BIN)/python tests/engines/install.py emulator
	@$(BIN)/python tests/engines/emulator.py '$(BUCKET)'

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

bench: $(INSTALLED) ## measure, each figure against a peer in the same run
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.train --growth
	$(BIN)/python -m benchmarks.train --replicas 2
	@test -z "$$MNIST_IDX_DIR" || $(BIN)/python -m benchmarks.train --whole "$$MNIST_IDX_DIR"
	@test -z "$$MNIST_IDX_DIR" || $(BIN)/python -m benchmarks.preprocess --idx "$$MNIST_IDX_DIR"
	@test -z "$$MNIST_IDX_DIR" || $(BIN)/python -m benchmarks.evaluate --idx "$$MNIST_IDX_DIR"
	@test -z "$$MNIST_IDX_DIR" || $(BIN)/python -m benchmarks.job --idx "$$MNIST_IDX_DIR"

gpu-check: $(INSTALLED) ## show on this machine's GPUs what the tests show on logical CPUs (pip install '.[gpu]')
	$(BIN)/python -m benchmarks.gpu_check

picture: $(INSTALLED) ## draw the README's picture of the report under ROOT (needs chromium)
	$(BIN)/python docs/picture.py '$(ROOT)' docs/report.png

lock: ## write constraints.txt anew from the newest versions that go together
	rm -rf $(VENV)/lock && $(PYTHON) -m venv $(VENV)/lock
	$(VENV)/lock/bin/pip install --quiet --upgrade setuptools
	$(VENV)/lock/bin/pip install --quiet '.[report,cloud,dev]'
	( sed -n '/^#/p' constraints.txt; $(VENV)/lock/bin/pip freeze --all --exclude digits-pipeline --exclude pip ) > constraints.new
	mv constraints.new constraints.txt && rm -rf $(VENV)/lock

clean: ## remove what make made, ROOT and its models excepted
	rm -rf $(VENV) .engines build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
