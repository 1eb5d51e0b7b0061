# make demo    two real vLLM engines (CPU build) behind the gateway, on this machine; ARGS are passed on
# make test    every check: style, types, tests, the tests on real engines
# make check   style and types only; make unit   the tests that start no engine
# make gpu-check   on a machine with a GPU and PyTorch: builds, tests and measures the CUDA backend (docs/gpu.md)
# Everything is installed into .venv in this checkout; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
STAMPS := .venv/.stamps
SOURCES := $(shell find kv_protocol router worker_connector -name '*.py' -o -name 'py.typed') pyproject.toml README.md \
	CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test check unit gpu-check clean

demo: $(STAMPS)/package
	$(BIN)/pip install --quiet openai
	$(BIN)/warmroute demo $(ARGS)

test: check $(STAMPS)/engine $(STAMPS)/servers $(STAMPS)/bench
	cd $(STAMPS)/bench && ../../bin/python -m pytest $(ARGS)

check: $(STAMPS)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(STAMPS)/tools $(STAMPS)/servers $(STAMPS)/bench
	cd $(STAMPS)/bench && ../../bin/python -m pytest -m 'not engine' $(ARGS)

# The tests run from a copy, so that what they import is the installed package and not the sources beside them.
.PHONY: $(STAMPS)/bench
$(STAMPS)/bench:
	rm -rf $@ && mkdir -p $@ && cp -R tests benchmarks csrc docs CMakeLists.txt pyproject.toml README.md CHANGELOG.md $@

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "warmroute needs Python 3.11 or later; choose one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
		apt-get update -qq && apt-get install -qq -y python3-venv python3-dev && $(PYTHON) -m venv --clear .venv; } || \
		{ echo "cannot make a virtual environment: install python3-venv (Debian: apt-get install python3-venv)"; exit 1; }
	mkdir -p $(STAMPS) && touch $@

# CMake and Ninja come from PyPI where they are missing; a C++ compiler does not.
$(STAMPS)/compiler: | $(STAMPS)/venv
	@{ command -v "$${CXX:-c++}" || command -v g++ || command -v clang++; } > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && apt-get install -qq -y g++; } || \
		{ echo "the native core needs a C++ compiler: install one (Debian: apt-get install g++), or name one in CXX"; exit 1; }
	touch $@

$(STAMPS)/package: $(STAMPS)/venv $(STAMPS)/compiler $(SOURCES)
	$(BIN)/pip install --quiet .
	touch $@

$(STAMPS)/tools: $(STAMPS)/package
	$(BIN)/pip install --quiet '.[dev]'
	touch $@

$(STAMPS)/engine: $(STAMPS)/package
	$(BIN)/python -m router.demo_fleet
	touch $@

# Servers that tests of stores start; without them those tests are skipped and say so.
$(STAMPS)/servers: $(STAMPS)/venv
	@command -v redis-server > /dev/null && ldconfig -p | grep -q libibverbs || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends redis-server libibverbs1; } || \
		echo "no redis-server or libibverbs here: tests of remote stores will be skipped"
	touch $@

# With the interpreter that has PyTorch, which the virtual environment of the other targets need not have.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf .venv build dist
