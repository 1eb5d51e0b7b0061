# make demo    two real vLLM engines (CPU build) behind the gateway, on this machine; ARGS are passed on
# make test    every check: style, types, tests, the tests on real engines
# make check   style and types only; make unit   the tests that start no engine
# Everything is installed into .venv in this checkout; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMPS := .venv/.stamps
SOURCES := $(shell find kv_protocol router worker_connector -name '*.py' -o -name 'py.typed') pyproject.toml README.md

.PHONY: demo test check unit clean

demo: $(STAMPS)/package
	$(BIN)/pip install --quiet openai
	$(BIN)/warmroute demo $(ARGS)

test: check $(STAMPS)/engine $(STAMPS)/bench
	cd $(STAMPS)/bench && ../../bin/python -m pytest $(ARGS)

check: $(STAMPS)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(STAMPS)/tools $(STAMPS)/bench
	cd $(STAMPS)/bench && ../../bin/python -m pytest -m 'not engine' $(ARGS)

# The tests run from a copy, so that what they import is the installed package and not the sources beside them.
.PHONY: $(STAMPS)/bench
$(STAMPS)/bench:
	rm -rf $@ && mkdir -p $@ && cp -R tests benchmarks csrc docs pyproject.toml README.md CHANGELOG.md $@

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "warmroute needs Python 3.11 or later; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
		apt-get update -qq && apt-get install -qq -y python3-venv python3-dev && $(PYTHON) -m venv --clear .venv; } || \
		{ echo "cannot make a virtual environment: install python3-venv (Debian: apt-get install python3-venv)"; exit 1; }
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/venv $(SOURCES)
	$(BIN)/pip install --quiet .
	touch $@

$(STAMPS)/tools: $(STAMPS)/package
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

$(STAMPS)/engine: $(STAMPS)/package
	$(BIN)/python -m router.demo_fleet
	touch $@

clean:
	rm -rf .venv build dist
