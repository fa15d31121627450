# Python and pip are all that a fresh machine needs: every target makes .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: audit test check format docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

audit: $(VENV)/installed          ## bracket the robust accuracy of the built-in network
	$(BIN)/calipers audit --budget 60s --report audit.html

test: $(VENV)/tools               ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

check: $(VENV)/tools              ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/tools
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/docs                ## the site, in build/docs/html; pages run once, then again when code changes
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs/trees docs build/docs/html
	$(BIN)/python docs/_tools/offline.py build/docs/html

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache dist
