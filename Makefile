# Everything a fresh machine needs: Python >= 3.10 and make. `make demo` and `make test` set up their own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo

# What is installed is pinned by the files of .ci/locks/ (`make lock` says how they are made). torch stands outside their
# hashed part where there is no NVIDIA driver: pip takes this release's CPU build where it finds one, else PyPI's.
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make …` shows it a place that has one for every Python.
# `make TORCH="torch==2.11.0" …` puts another release in place of the locked one, on any machine.
TORCH_VERSION := 2.13.0
LOCKED := .ci/locks/base.txt
ifdef TORCH
else ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH := torch==$(TORCH_VERSION)
else
LOCKED += .ci/locks/cuda.txt
endif

.PHONY: demo test test-all test-gguf test-models test-lowest test-newest test-vllm smoke-newest lock gate lint format setup reference-model bench bench-gpu bench-peers \
	gpu-session docs clean help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(BIN)/.ready ## Make .venv and install pq with its development tools

# No build isolation: what builds a package that comes as source is pinned too. No dependencies: the files hold them all.
PIP := $(BIN)/python -m pip
HASHED := --quiet --require-hashes --no-deps --no-build-isolation
$(BIN)/.ready: pyproject.toml Makefile $(wildcard .ci/locks/*.txt)
	$(PYTHON) -c 'import sys; sys.exit("pq needs Python 3.10 or newer; set PYTHON=") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] > (3, 13))'; then \
		set -ex; \
		$(PIP) install $(HASHED) -r .ci/locks/build.txt; \
		$(PIP) install $(HASHED) $(LOCKED:%=-r %); \
		$(if $(TORCH),$(PIP) install --quiet "$(TORCH)";) \
		$(PIP) install --quiet --no-deps --no-build-isolation --editable .; \
		$(PIP) check; \
	else \
		echo ".ci/locks/ is for Python 3.10 to 3.13; on this one the newest releases in pyproject.toml's ranges are installed"; \
		set -ex; \
		$(if $(TORCH),$(PIP) install --quiet "$(TORCH)";) \
		$(PIP) install --quiet --editable ".[dev,docs]"; \
	fi
	touch $@

LOCKER ?= .venv-lock
lock: ## Pin the newest releases that pyproject.toml admits, with hashes, for Python 3.10 to 3.13 (needs the network)
	test -x $(LOCKER)/bin/python || $(PYTHON) -m venv $(LOCKER)
	$(LOCKER)/bin/python -m pip install --quiet --upgrade uv packaging "tomli; python_version < '3.11'"
	$(LOCKER)/bin/python .ci/locks/lock.py --uv $(LOCKER)/bin/uv --torch $(TORCH_VERSION)

demo: setup ## Convert the embedded reference model with fireq.yaml and measure it against its parent
	rm -rf $(OUT) $(OUT).*
	$(BIN)/pq convert --model eval/reference-model --recipe fireq.yaml --output $(OUT) --nsamples 64 --seqlen 512
	$(BIN)/pq eval $(OUT) --baseline eval/reference-model
	$(BIN)/pq verify $(OUT) --parent eval/reference-model
	$(BIN)/pq report $(OUT)

test: setup ## Run the tests, but for sweeps (about as long as a coffee)
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu and not slow"

test-all: setup ## Run the tests and the sweeps that `make test` runs a part of
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not gpu"

test-models: setup ## Put every type of the installed transformers to the law, and write the table of models anew
	mkdir -p out
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 PQ_NO_VERSION_NOTICE=1 PYTHONPATH=tests:. \
		$(BIN)/python -W ignore -m models.sweep out/models.json --law
	PYTHONPATH=tests:. $(BIN)/python -m models.table out/models.json
	$(BIN)/python docs/generate.py

# llama.cpp is built from source, without its multimodal part; make's own -j does not reach it.
GGUF ?= .venv-gguf
test-gguf: $(GGUF)/.ready ## Build a real llama.cpp in an environment of its own (some minutes, once) and run what needs it
	$(GGUF)/bin/python -m pytest -q -rs tests/serving/test_llama_cpp.py

$(GGUF)/.ready: pyproject.toml
	test -x $(GGUF)/bin/python || $(PYTHON) -m venv $(GGUF)
	$(if $(TORCH),$(GGUF)/bin/python -m pip install --quiet "$(TORCH)")
	CMAKE_ARGS="$${CMAKE_ARGS:--DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF}" \
		$(GGUF)/bin/python -m pip install --quiet --editable ".[test]" "llama-cpp-python>=0.3.30"
	touch $@

LOWEST ?= .venv-lowest
test-lowest: ## Run the fast tests with the lowest versions that pyproject.toml allows, in an environment of their own
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
		--extra test pyproject.toml --output-file $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -q -n auto --dist worksteal -m "not gpu and not slow and not shared"

# As `make setup`, but with the newest releases, also of an environment that is there already; and no bytecode of
# packages of which the smoke imports a part. Where torch is pinned it stays, or its CPU build would give way.
NEWEST ?= .venv-newest
.PHONY: newest
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --no-compile --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager \
		$(if $(TORCH),"$(TORCH)") --editable ".[test]"

test-newest: newest ## Run the fast tests with the newest versions that pyproject.toml allows, in an environment of their own
	$(NEWEST)/bin/python -m pytest -q -n auto --dist worksteal -m "not gpu and not slow and not shared"

# Cached between runs. Where Python 3.11 or the network is absent a line says so and nothing is tested (code 75).
VLLM ?= .venv-vllm
VLLM_PYTHON ?= python3.11
test-vllm: setup ## Convert small models and serve them with a real vLLM (its CPU build, in an environment of its own)
	@$(BIN)/python tests/vllm_engine/vllm_environment.py $(VLLM) --python $(VLLM_PYTHON); code=$$?; \
	if [ $$code = 75 ]; then exit 0; elif [ $$code != 0 ]; then exit $$code; fi; \
	set -x; PQ_VLLM=$(VLLM) $(BIN)/python -m pytest -q tests/vllm_engine && \
	PQ_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest -q -k "vllm" tests/plan tests/draft && \
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q --confcutdir=tests/vllm_plugin tests/vllm_plugin

smoke-newest: setup newest ## Convert, load, generate and evaluate with the newest versions; say what is newer than .ci/locks/
	$(NEWEST)/bin/python eval/smoke_newest.py --locked $(BIN)/python

gate: setup ## Convert the reference model with every shipped recipe and check its accuracy
	$(BIN)/pq eval --gate eval/baselines.yaml

lint: setup ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## Let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference-model: setup ## Train the embedded reference model again (about ten minutes on two cores)
	$(BIN)/python eval/reference-model/build.py

bench: setup ## Accuracy and cost of the shipped recipes on the reference model, into out/
	$(BIN)/python eval/accuracy.py --model eval/reference-model --bits 4 --output out/accuracy.json

bench-gpu: setup ## Speed of the kernels on this machine's GPU beside torch's, into eval/results/
	$(BIN)/python eval/gpu_speed.py --output eval/results

bench-peers: setup ## Conversions beside llm-compressor and AutoRound, each in an environment of its own, into eval/results/
	$(BIN)/python eval/bench_peers.py $(PEERS)

docs: setup ## Bring the generated pages up to date and build the documentation into out/site
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py
	$(BIN)/python eval/render.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# With PYTHON=… on the command line that interpreter is used as it is: a lent machine may reach no network.
ifeq ($(origin PYTHON),command line)
SESSION := $(PYTHON)
else
SESSION := $(BIN)/python
gpu-session: setup
endif
gpu-session: ## All that is worth doing on a GPU in nine minutes: right kernels, then their speed, into OUT=
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(SESSION) eval/gpu_session.py \
		--output $(if $(filter file,$(origin OUT)),out/gpu,$(OUT))

clean: ## Remove the environment and all outputs
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(LOCKER) $(GGUF) $(VLLM) out
