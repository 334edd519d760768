# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# What pip installs: the pins on which the tests run. The ranges of pyproject.toml keep a
# torch that is already there, for example one for your GPU. In a clone without .venv:
#   make demo VENV_ARGS=--system-site-packages INSTALL="--editable ."
# For the other targets it is INSTALL="--editable .[dev]".
INSTALL ?= --requirement requirements.txt
VENV_ARGS ?=
DEMO := $(CURDIR)/outputs/demo/$(shell date +%Y-%m-%d-%H%M%S)

.PHONY: help install block-table block-cost demo test lint format pages docs test-slow test-wheel test-slurm test-browser distill-table frontier-table isoflop-table scale-table devices-table bench bench-gpu check-gpu profile clean
.DEFAULT_GOAL := demo

# Installs what is asked for and is not there yet.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(BIN)/python -m pip install --quiet $(INSTALL)
	touch $(READY)

help:  ## what can be made
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

install: $(READY)  ## the environment .venv, and nothing else

demo: $(READY)  ## the paper in small: train DUO, distil it, sample before and after
	$(BIN)/python main.py experiment=demo_duo hydra.run.dir=$(DEMO)/duo $(ARGS)
	$(BIN)/python main.py experiment=demo_distill hydra.run.dir=$(DEMO)/distilled \
	    training.finetune_path=$(DEMO)/duo/checkpoints/last.ckpt $(ARGS)
	$(BIN)/python main.py -m experiment=demo_samples hydra.sweep.dir=$(DEMO)/samples \
	    eval.checkpoint_path=$(DEMO)/duo/checkpoints/last.ckpt,$(DEMO)/distilled/checkpoints/last.ckpt \
	    sampling.steps=8,64 $(ARGS)

# In the order of folders, where files of long tests come before those of short ones.
test: $(READY) lint  ## the default suite: minutes, no network, no GPU
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY)  ## what `make test` checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## mend what lint complains of, as far as ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m docs.site

# After a change of a key in configs/, of its comment, or of an error message.
pages: $(READY)  ## write docs/reference.md and docs/errors.md anew
	$(BIN)/python -m docs.site

docs: $(READY)  ## the documentation site, in build/docs; a broken link fails it
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -c docs/site . build/docs

test-slow: $(READY)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

test-wheel: $(READY)  ## the wheel, in a fresh environment away from the clone
	$(BIN)/python -m pytest -m slow tests/integration/test_wheel.py $(ARGS)

test-slurm: $(READY)  ## jobs under a real Slurm: apt-get install slurm-wlm munge, as root
	$(BIN)/python -m pytest -m slurm --timeout 900 $(ARGS)

test-browser: $(READY)  ## the pages in a real browser: apt-get install chromium
	$(BIN)/python -m pytest -m browser $(ARGS)

distill-table: $(READY)  ## SDTT, DI[M]O and DCD beside their teachers, on two cores
	$(BIN)/python benchmarks/distill_table.py $(ARGS)

frontier-table: $(READY)  ## samplers of DUO, MDLM and AR at the entropy of held-out text
	$(BIN)/python benchmarks/frontier_table.py $(ARGS)

block-table: $(READY)  ## perplexity against the size of blocks, and of AR
	$(BIN)/python benchmarks/block_table.py $(ARGS)

block-cost: $(READY)  ## time and memory of blocks beside whole rows and AR
	$(BIN)/python benchmarks/block_cost.py --uncached $(ARGS)

scale-table: $(READY)  ## the cost of a step against size, and what it predicts
	$(BIN)/python benchmarks/scale.py $(ARGS)

isoflop-table: $(READY)  ## the best sizes of MDLM and DUO for small budgets of FLOP
	$(BIN)/python benchmarks/isoflop_table.py $(ARGS)

devices-table: $(READY)  ## every algorithm on 1 and 2 devices and 2 nodes: equal weights
	$(BIN)/python benchmarks/devices_table.py $(ARGS)

bench: $(READY)  ## training, evaluation, sampling: ours against plain eager code
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-gpu: $(READY)  ## the same on a CUDA device: model=small, L = 1024, bf16
	$(BIN)/python benchmarks/bench.py --device cuda $(ARGS)

# Installs nothing: a machine with a GPU and no network has what docs/gpu.md lists.
check-gpu:  ## whether all of it works on this machine's GPU, and how fast; 8 minutes
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/check_gpu.py $(ARGS)

profile: $(READY)  ## where the time of a train step goes
	$(BIN)/python benchmarks/profile_step.py $(ARGS)

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) build outputs multirun .pytest_cache .ruff_cache .hypothesis
