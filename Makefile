PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a core: with more, PyTorch's threads wait for each other.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)

.PHONY: install test test-deepspeed lint format demo clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadfile

# Not a part of `test`: on a CPU DeepSpeed compiles what its processes share, for which a machine needs a C++ compiler.
test-deepspeed: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[deepspeed]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_deepspeed.py

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
	rm -rf $(VENV) outputs build dist *.egg-info
