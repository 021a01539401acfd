# `make demo` and `make test` set up everything they need in $(VENV).
VENV ?= .venv
PYTHON ?= python3
# On a machine with a GPU this is the CUDA build; name another build here if you need one.
TORCH ?= torch==2.13.0
DEMO_FLAGS ?=
# A file's tests stay together: many share what is made once per file. Files with slow tests come first.
# A process that dies fails the test it ran: started again it would run that test again, without end.
TEST_FLAGS ?= --numprocesses auto --dist loadscope --no-loadscope-reorder --max-worker-restart 0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs audit install clean

demo: install
	$(BIN)/fastpo demo $(DEMO_FLAGS)

test: install
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation's site, into build/site; a broken link is an error. It has a place of its own.
docs:
	test -x $(VENV)/docs/bin/pip || $(PYTHON) -m venv $(VENV)/docs
	$(VENV)/docs/bin/pip install --quiet --requirement scripts/docs-requirements.txt
	PATH="$(CURDIR)/$(VENV)/docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

# Known holes and licenses of all dependencies, into docs/audit.md. The tools have a place of their own.
audit: install
	test -x $(VENV)/audit/bin/pip-licenses || $(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --requirement scripts/audit-requirements.txt
	$(BIN)/python scripts/audit.py --tools $(VENV)/audit/bin

install: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install $(TORCH)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
