# Two commands matter: `make demo` (set-up and the main job) and `make test` (set-up and tests).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
READY := $(VENV)/.ready

.PHONY: demo demo-ddim test test-slow check format lint types layers bench compare compare-glyphs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e '.[dev,tensorboard]'
	@touch $@

demo: $(READY)
	$(BIN)/vmpo train glyphs --run $(RUN) --resume
	$(BIN)/vmpo evaluate $(RUN)
	$(BIN)/vmpo report $(RUN)

# The same job on the embedded Stable Diffusion 1.x: a UNet, DDIM and guidance.
demo-ddim: $(READY)
	$(BIN)/vmpo train glyphs-ddim --run runs/demo-ddim --resume
	$(BIN)/vmpo evaluate runs/demo-ddim
	$(BIN)/vmpo report runs/demo-ddim

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

check: $(READY) format-check lint types layers test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: format-check
format-check: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

# Rollout and update speed against the machine's matrix-product rate (benchmarks/README.md).
bench: $(READY)
	$(BIN)/python benchmarks/throughput.py glyphs

# Every objective in worlds with a known answer: a page, a quarter of an hour on two cores.
compare: $(READY)
	$(BIN)/vmpo compare --out runs/comparison

# Every objective on the embedded pipeline, a short training each: about half an hour on two cores.
compare-glyphs: $(READY)
	$(BIN)/vmpo compare --on glyphs --seeds 1 --out runs/comparison $(addprefix --set ,$(SHORT))
SHORT := optimisation.epochs=12 evaluation.every=0 evaluation.final_prompts=64 evaluation.truth_prompts=8 max_minutes=null

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
