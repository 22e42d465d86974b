PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a core: with more, PyTorch's threads wait for each other.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
# In the order of tests/conftest.py, which puts what takes long first.
SPREAD = -n $(THREADS) --dist loadfile --no-loadscope-reorder
# Bytecode is kept, also where the environment forbids it: otherwise every launched process compiles the package again.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(SPREAD)

.PHONY: install test test-fast test-gpu test-lowest test-newest test-deepspeed build wheel-check docs lint format demo clean

install: $(STAMP)

# constraints.txt holds the versions that the tests run with.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python >= 3.11 is needed, this is ' + sys.version.split()[0] if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

test: install
	$(PYTEST)

# Between two edits: what starts no process and takes no seconds.
test-fast: install
	$(PYTEST) -m "not slow"

# Also where `make test` finds a GPU. In a process of their own, since it is hidden from all other tests.
test: test-gpu

test-gpu: install
	if $(BIN)/python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		$(BIN)/python -m pytest -m gpu; \
	fi

# The suite with the lowest versions that pyproject.toml names, of its direct dependencies, or with the newest that there are.
# TESTS: files and options for pytest instead of the whole suite.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest $(SPREAD) $(TESTS)

.venv-lowest/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip uv
	.venv-lowest/bin/uv pip compile --quiet --python .venv-lowest/bin/python --resolution lowest-direct --extra dev \
		--output-file .venv-lowest/constraints.txt pyproject.toml
	.venv-lowest/bin/python -m pip install --quiet --constraint .venv-lowest/constraints.txt --editable ".[dev]"
	touch $@

test-newest:
	test -d .venv-newest || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade pip
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(SPREAD) $(TESTS)

# dist/: the source distribution, and the wheel that is built from it.
build:
	rm -rf build/lib build/bdist.* dist
	test -d .venv-build || $(PYTHON) -m venv .venv-build
	.venv-build/bin/python -m pip install --quiet --upgrade pip build
	.venv-build/bin/python -m build --outdir dist .

# What is in both, and the README's first lines and the command run with the wheel and nothing else, outside of the checkout.
wheel-check: build
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --upgrade pip
	.venv-wheel/bin/python tests/check_wheel.py contents dist/*.whl
	.venv-wheel/bin/python tests/check_wheel.py source dist/*.tar.gz
	.venv-wheel/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	OMP_NUM_THREADS=1 .venv-wheel/bin/python tests/check_wheel.py command
	OMP_NUM_THREADS=1 .venv-wheel/bin/python tests/check_wheel.py readme

# The pages of docs/source as HTML, in build/docs/html. What does not resolve is an error.
docs: .venv-docs/.installed
	.venv-docs/bin/python docs/build.py

.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	.venv-docs/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# Not a part of `test`: on a CPU DeepSpeed compiles what its processes share, for which a machine needs a C++ compiler.
test-deepspeed: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed/test_deepspeed.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: install
	OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch --config_file examples/accelerate_configs/cpu.yaml \
		examples/opd_sd3.py --config examples/configs/tiny.yaml

clean:
	rm -rf $(VENV) .venv-* outputs build dist *.egg-info
