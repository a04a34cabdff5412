# Each target does its own set-up: a fresh machine with Python 3.11+, pip and make is enough.
PYTHON ?= python3
VENV   ?= .venv
# PyTorch is installed first and pinned: another version may pull gigabytes of CUDA packages.
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
MODEL  ?= millrace-mini
PORT   ?= 8000

# What `make lock` leaves out of the lock files: PyTorch, and what comes by it alone.
UNLOCKED := torch networkx sympy mpmath
COMPILE = $(BIN)/uv pip compile -q pyproject.toml --universal --python-version 3.11 --upgrade \
	--generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" \
	$(UNLOCKED:%=--no-emit-package %)

.PHONY: serve example test sweep lint bench soak docs lock sbom audit clean

# The locked versions come first, by their hashes; what pyproject.toml has beyond them comes after.
$(VENV)/.installed: pyproject.toml requirements/test.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing millrace into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
		-r requirements/test.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@$(BIN)/python -m millrace.kernels.cpu.build
	@touch $@

serve: $(VENV)/.installed  ## start what ships on http://127.0.0.1:$(PORT)
	@$(BIN)/millrace serve $(MODEL) --port $(PORT) $(ARGS)

$(VENV)/.example: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[example]'
	@$(BIN)/python -m examples.insurance --build
	@touch $@

example: $(VENV)/.example  ## the worked example on http://127.0.0.1:8080: an insurance assistant
	@$(BIN)/python -m examples.insurance $(ARGS)

lint: $(VENV)/.installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# The GPU kernels run in Triton's interpreter, on one core beside the lint on the other; in the second
# run they are skipped.
test: $(VENV)/.installed  ## lint, types and every test that needs no GPU
	@mkdir -p build; TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -m "not gpu" -rf \
		tests/kernels/gpu tests/runtime/kernel_tuning >build/interpreted.log 2>&1 & kernels=$$!; \
	trap "kill $$kernels" INT TERM; $(MAKE) -s lint; linted=$$?; \
	wait $$kernels; tested=$$?; cat build/interpreted.log; [ $$linted = 0 ] && [ $$tested = 0 ]
	@$(BIN)/python -m pytest -m "not gpu and not sweep" $(ARGS)

sweep: $(VENV)/.installed  ## the tests that take minutes, or that compare with a quiet machine
	@$(BIN)/python -m pytest -m "sweep and not gpu" $(ARGS)

bench: $(VENV)/.installed  ## serve 1, 2 and 3 replicas and print the scaling table
	@$(BIN)/millrace bench scaling $(MODEL) $(ARGS)

soak: $(VENV)/.installed  ## ten minutes of kills and hostile clients against two replicas
	@$(BIN)/python benchmarks/soak_fleet.py $(ARGS)

docs: $(VENV)/.installed  ## build the documentation site in build/site, with strict links
	@$(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

$(VENV)/.supply: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[supply]'
	@touch $@

lock: $(VENV)/.supply  ## make the lock files anew, with the newest versions that pyproject.toml allows
	@$(COMPILE) --extra bench --extra otel --extra plan --extra tune --no-emit-package setuptools \
		-o requirements/ship.lock
	@$(COMPILE) --extra test -o requirements/test.lock

sbom: $(VENV)/.supply  ## list what ships in build/sbom.cdx.json (CycloneDX)
	@mkdir -p build
	@{ echo '$(TORCH)'; cat requirements/ship.lock; } > build/ship.txt  # PyTorch ships, unlocked
	@$(BIN)/python -W ignore -m cyclonedx_py requirements build/ship.txt --pyproject pyproject.toml \
		--output-reproducible --of JSON -o build/sbom.cdx.json
	@echo "build/sbom.cdx.json"

# --strict: a package whose advisories cannot be read is a failure, not a pass.
AUDIT = $(BIN)/pip-audit --strict --disable-pip --progress-spinner off
audit: $(VENV)/.supply  ## look the locked versions up in the advisories of their registry
	@mkdir -p build
	@echo '$(TORCH)' > build/torch.txt
	@$(AUDIT) --require-hashes -r requirements/ship.lock -r requirements/test.lock
	@$(AUDIT) --no-deps -r build/torch.txt

clean:
	rm -rf $(VENV) build dist src/*.egg-info
