# Each target does its own set-up: a fresh machine with Python 3.11+, pip and make is enough.
PYTHON ?= python3
VENV   ?= .venv
# PyTorch is installed first and pinned: another version may pull gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
MODEL  ?= millrace-mini
PORT   ?= 8000

.PHONY: serve test lint bench soak docs clean

$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing millrace into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -m millrace.kernels.cpu.build
	@touch $@

serve: $(VENV)/.installed  ## start what ships on http://127.0.0.1:$(PORT)
	@$(BIN)/millrace serve $(MODEL) --port $(PORT) $(ARGS)

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The GPU kernels run in Triton's interpreter first; in the second run they are skipped.
test: $(VENV)/.installed lint  ## lint, types and every test that needs no GPU
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not gpu" -rf tests/kernels/gpu
	@$(BIN)/python -m pytest -m "not gpu" $(ARGS)

bench: $(VENV)/.installed  ## serve 1, 2 and 3 replicas and print the scaling table
	@$(BIN)/millrace bench scaling $(MODEL) $(ARGS)

soak: $(VENV)/.installed  ## ten minutes of kills and hostile clients against two replicas
	@$(BIN)/python benchmarks/soak_fleet.py $(ARGS)

docs: $(VENV)/.installed  ## build the documentation site in build/site, with strict links
	@$(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist src/*.egg-info
