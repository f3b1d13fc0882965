# Each target does its own set-up; all that is needed is Python 3.11 or later, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test gpu-test check format clean
help:
	@echo "make demo    run a real model, cut across two Ray actors"
	@echo "make test    lint, types and all tests"
	@echo "make gpu-test  the tests and the bench of the CUDA backend, with the Python that is there"
	@echo "make check   lint and types alone"
	@echo "make format  let ruff format the sources"
	@echo "make clean   remove the virtual environment and caches"

$(BIN)/raygraft: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Raygraft needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(BIN)/raygraft
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,peer]'
	@touch $@

demo: $(BIN)/raygraft
	$(BIN)/raygraft run --prompt "The capital of France is" --n-predict 32 --temp 0 --show-plan \
	  --device attention:threads=1 --device feed-forward:threads=1 \
	  --place 'kind:attention=attention' --place 'kind:ffn=feed-forward'

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p raygraft

# Two at a time, but for those that run commands and clusters of their own: they look at how long
# something takes and at what it leaves behind.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not process"
	$(BIN)/python -m pytest -m process

# No environment of its own: a machine with a GPU may have no network. It needs CuPy and pytest.
gpu-test:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/cuda
	PYTHONPATH=. $(PYTHON) bench/gpu.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
