# `make` lists the targets. Each makes the environment it needs, once per change of pyproject.toml.
#   make eval-fp8 PY=python3      use this interpreter, which has everything; no environment is made
#   make test TORCH=torch==2.12   another torch
#   make test VERSIONS=oldest     the tests alone, on requirements/oldest.txt, in .venv-oldest
#   make test VERSIONS=newest     the same on the newest of everything, in .venv-newest, which is made afresh each time
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help venv install eval-fp8 test test-gpu nightly bench-kernels lint format report clean always
export TIMEFORMAT := took %0lR

VENV    ?= .venv$(addprefix -,$(VERSIONS))
CONFIG  ?= configs/eval-fp8.toml
ARGS    ?=
NIGHTLY ?= configs/nightly.toml
POLICY  ?= tasks/policies/default.toml
HISTORY ?= history
SITE    ?= site
WORKERS ?= 2
GPU     := $(shell command -v nvidia-smi)
EXTRAS  ?= $(if $(GPU),cuda$(comma)dev,dev)
TORCH   ?= $(if $(GPU),,$(TORCH_$(VERSIONS)))
# CPU wheels live here; without a GPU, the default index would bring gigabytes of CUDA libraries.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
comma := ,

# What VERSIONS stands for: from which interpreter, which torch without a GPU, and how the rest is installed.
PYTHONS_ = python3 python3.13 python3.12 python3.11
TORCH_   = torch==2.13.0
INSTALL_ = $(PIP) -e ".[$(EXTRAS)]"
PYTHONS_oldest = python3.11 python3.12
TORCH_oldest   = $(shell grep ^torch== requirements/oldest.txt)
INSTALL_oldest = $(INSTALL_) -c requirements/oldest.txt
PYTHONS_newest = $(PYTHONS_)
TORCH_newest   = torch
INSTALL_newest = $(PY) requirements/newest.py $(EXTRAS) > $(VENV)/newest.txt && $(PIP) -U -r $(VENV)/newest.txt \
    && $(PIP) --no-deps -e .
$(if $(value INSTALL_$(VERSIONS)),,$(error VERSIONS=$(VERSIONS) is unknown: oldest or newest is right, or nothing))

ifdef PY
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.installed
endif
PIP := $(PY) -m pip install -qq --disable-pip-version-check
CPU_WHEEL = { $(PIP) --retries 0 --timeout 15 --index-url $(TORCH_INDEX) "$(TORCH)" \
    || { echo "$(TORCH) is not at $(TORCH_INDEX): taking it from pip's own index" >&2; false; }; }
INSTALL_TORCH = $(if $(TORCH),{ $(if $(GPU),,$(CPU_WHEEL) ||) $(PIP) "$(TORCH)"; },true)

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9 -]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

install venv: $(READY)  ## make the environment

$(VENV)/.installed: pyproject.toml $(wildcard requirements/$(VERSIONS).txt) $(if $(filter newest,$(VERSIONS)),always)
	@for python in $(or $(PYTHON),$(PYTHONS_$(VERSIONS))) ""; do \
	    [ -z "$$python" ] || "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done; \
	[ -n "$$python" ] || { echo "no Python 3.11 or newer found: make PYTHON=/path/to/python" >&2; exit 1; }; \
	echo "installing into $(VENV): $$("$$python" --version), $(or $(TORCH),torch)$(if $(GPU),, for CPU), .[$(EXTRAS)]"; \
	"$$python" -m venv $(if $(VERSIONS),--clear) $(VENV)
	@time { $(INSTALL_TORCH) && $(INSTALL_$(VERSIONS)); }
	@touch $@

eval-fp8: $(READY)  ## what fp8 KV formats cost against bf16, on the embedded checkpoint
	@time $(PY) -m evalkit.cli run --config $(CONFIG) $(ARGS)

test: $(if $(VERSIONS),$(READY),lint)  ## ruff, mypy, and every test that needs no GPU
	@time $(PY) -m pytest -q -n $(WORKERS) -m "not gpu" $(ARGS)

test-gpu: $(READY)  ## the tests that need a GPU
	@time $(PY) -m pytest -q -m gpu $(ARGS)

# A night that fails is still shown: what is missing then is an alert of its own.
nightly: $(READY)  ## run, judge, add to HISTORY, write the dashboard to SITE; fails on an alert
	@set -o pipefail; failed=0; \
	run=$$($(PY) -m evalkit.cli run --config $(NIGHTLY) --policy $(POLICY) $(ARGS) | tee >(cat >&2) | tail -n 1) || failed=$$?; \
	if [ $$failed = 0 ]; then \
	    $(PY) -m evalkit.cli gate "$$run" --policy $(POLICY) || case $$? in 10|11|12) ;; *) failed=1 ;; esac; \
	    $(PY) -m evalkit.cli history add "$$run" --store $(HISTORY) || failed=1; \
	fi; \
	$(PY) -m evalkit.cli dashboard $(HISTORY) --out $(SITE) --repository . || failed=$$?; \
	exit $$failed

bench-kernels: $(READY)  ## errors and times of every format on every kernel that reads it here
	@time $(PY) -m benchmarks.kernels $(ARGS)

lint: $(READY)  ## ruff and mypy
	@$(PY) -m ruff check -q
	@$(PY) -m ruff format -q --check
	@time $(PY) -m mypy

format: $(READY)  ## rewrite files as ruff formats them
	@$(PY) -m ruff check -q --fix-only
	@$(PY) -m ruff format -q

report: $(READY)  ## write the newest run's report again
	@$(PY) -m evalkit.cli report $(ARGS)

clean:  ## remove the environment and caches; runs/ stays
	@rm -rf $(VENV) .venv .venv-oldest .venv-newest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
