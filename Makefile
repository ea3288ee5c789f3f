# make run    from a bare clone to a quantized model, its quality, and a story
# make test   the whole suite, lint and sanitize included
# make lint   ruff, mypy, import layers
# make sanitize   the core's C++ tests under the compiler's sanitizers
#
# PYTHON=python3.12 picks an interpreter; TORCH_INDEX=URL passes pip another index for torch.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q
INSTALL_INPUTS := pyproject.toml CMakeLists.txt constraints.txt $(wildcard quantlab/native/src/*.* quantlab/native/src/engine/* \
	quantlab/native/src/quantizers/* quantlab/native/src/adapters/*)
MODEL := models/fable-9m
PROMPT := Once upon a time there was a little girl who lived by the sea.

.PHONY: run test lint sanitize clean

run: $(VENV)/.installed
	$(BIN)/python benchmarks/formats.py $(MODEL) tests/data/prose.txt --formats q4_1 --out out
	$(BIN)/quantlab generate out/fable-9m-q4_1 --prompt "$(PROMPT)" --max-tokens 200

test: $(VENV)/.installed-test lint sanitize
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/lint && mkdir -p build/lint
	cp -r quantlab build/lint/quantlab && cp -r cli build/lint/quantlab/cli
	$(BIN)/mypy
	$(BIN)/python tests/import_layers.py build/lint

sanitize:
	$(MAKE) -s -j $(JOBS) -C tests/native/cpp

# torch first: asked for by version, the index's small CPU build serves; any other way pulls gigabytes of CUDA packages.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("quantlab needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(INSTALL_INPUTS)
	$(PIP) -c constraints.txt -e .
	mkdir -p out && touch $@

# It has all that .installed has: the core is compiled once.
$(VENV)/.installed-test: $(VENV)/.torch $(INSTALL_INPUTS)
	$(PIP) -c constraints.txt -e '.[test]'
	mkdir -p out && touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
