# Everything a fresh machine needs: Python >= 3.10 and make. `make demo` and `make test` set up their own environment.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= out/demo

# A machine without an NVIDIA driver gets the newest CPU build of torch that pip can find; override with
# `make TORCH="torch==2.11.0" …`, or TORCH=torch for the default build.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH ?= torch==2.13.0
else
TORCH ?= torch
endif

.PHONY: demo test test-lowest gate lint format setup reference-model bench bench-gpu docs clean help

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(BIN)/.ready ## Make .venv and install pq with its development tools

$(BIN)/.ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; sys.exit("pq needs Python 3.10 or newer; set PYTHON=") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" || $(BIN)/python -m pip install --quiet "torch>=2.11"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup ## Convert the embedded reference model with fireq.yaml and measure it against its parent
	rm -rf $(OUT) $(OUT).*
	$(BIN)/pq convert --model eval/reference-model --recipe fireq.yaml --output $(OUT) --nsamples 64 --seqlen 512
	$(BIN)/pq eval $(OUT) --baseline eval/reference-model
	$(BIN)/pq verify $(OUT) --parent eval/reference-model
	$(BIN)/pq report $(OUT)

test: setup ## Run the tests (about as long as a coffee)
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m "not gpu"

LOWEST ?= .venv-lowest
test-lowest: ## Run the fast tests with the lowest versions that pyproject.toml allows, in an environment of their own
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --python $(LOWEST)/bin/python \
		--extra test pyproject.toml --output-file $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps --editable .
	$(LOWEST)/bin/python -m pytest -q -n auto --dist loadfile -m "not gpu and not slow and not shared"

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

docs: setup ## Bring the generated pages up to date and build the documentation into out/site
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/pictures.py
	$(BIN)/python eval/render.py
	$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## Remove the environment and all outputs
	rm -rf $(VENV) $(LOWEST) out
