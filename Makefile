PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup torch federated demo test test-all shapes lint bench docs notebooks clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $(STAMP)

torch: $(STAMP)  # a wheel of some 200 MB where there is one for CPUs, else of some GB
	$(BIN)/python -m pip install --quiet torch==2.13.0 --editable .[torch] --group dev

federated: $(STAMP)  # Flower holds typer, rich and protobuf at older versions
	$(BIN)/python -m pip install --quiet --editable .[flower,nvflare] --group dev

demo: $(STAMP)
	$(BIN)/leakjax invert --model cnn6 --index 0,1,2,3 --out demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: lint
	$(BIN)/python -m pytest -n auto -m "not slow"

test-all: lint torch federated
	$(BIN)/python -m pytest -n auto

shapes: $(STAMP)
	LEAKJAX_CHECK_SHAPES=1 $(BIN)/python -m pytest -n auto -m "not slow"

bench: $(STAMP)
	$(BIN)/python -m benchmarks throughput --out bench-out

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

notebooks: $(STAMP)
	$(BIN)/python notebooks/run.py

clean:
	rm -rf $(VENV) demo bench-out leakjax-out site
