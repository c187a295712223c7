# On a fresh machine `make demo` and `make test` do all the set-up themselves: each makes $(VENV) where it is missing.
PYTHON ?= python3
VENV ?= .venv
# Empty to install as a user would; .ci/run does that, so that the packaging is tested too.
EDITABLE ?= -e
TESTS ?= -n 2
OUT ?= build/demo

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MODEL := models/digits_cnn.onnx
TYPED := build/typecheck/qcompile

# The folder qcompile/ of the checkout must not stand in for the installed package in `python -m qcompile`.
export PYTHONSAFEPATH := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types bench edge-setup edge models clean

help:
	@echo "make demo    install, then compile and measure a shipped model (into $(OUT))"
	@echo "make test    install, then run the tests"
	@echo "make lint    ruff, rules and format"
	@echo "make types   mypy --strict"
	@echo "make bench   compare with onnxruntime's own quantiser; writes benchmarks/RESULTS.md"
	@echo "make edge    one file on every machine: writes docs/edge-matrix.md (fetches emulators and runtimes into build/edge)"
	@echo "make models  train and export the shipped models again (installs torch)"
	@echo "make clean   remove what the targets above have made"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "qcompile needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	rm -rf build/lib build/bdist.* qcompile.egg-info
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(EDITABLE) '.[test,images]'
	@touch $@

demo: $(INSTALLED)
	@mkdir -p $(OUT)
	$(BIN)/qcompile $(MODEL) -o $(OUT)/digits_cnn.int8.onnx --data models/digits_calib.npz \
		--eval models/digits.npz --max-drop 1 --report $(OUT)/report.json
	$(BIN)/qcompile inspect $(OUT)/digits_cnn.int8.onnx --dyadic --require-exact

# Each worker has a core; more threads in each would fight for them (1.8 times the time).
test: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 $(BIN)/pytest $(TESTS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The three folders become one package only when installed; mypy sees it through links.
types: $(INSTALLED)
	rm -rf $(TYPED)
	mkdir -p $(TYPED)
	ln -s $(CURDIR)/qcompile/*.py $(CURDIR)/qcompile/py.typed $(TYPED)/
	ln -s $(CURDIR)/passes $(CURDIR)/kernels $(TYPED)/
	MYPYPATH=build/typecheck $(BIN)/mypy --strict -p qcompile

bench: $(INSTALLED)
	$(BIN)/python benchmarks/compare.py --output benchmarks/RESULTS.md

edge-setup: $(INSTALLED)
	benchmarks/edge/setup.sh $(BIN)/python

edge: edge-setup
	env -u PYTHONSAFEPATH $(BIN)/python benchmarks/edge/matrix.py  # its modules stand beside it

models: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(EDITABLE) '.[train]'
	$(BIN)/python models/train.py

clean:
	rm -rf $(VENV) build dist qcompile.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find qcompile passes kernels tests benchmarks models -name __pycache__ -prune -exec rm -rf {} +
