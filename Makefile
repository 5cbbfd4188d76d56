# make demo      train a sentiment classifier with torch.nn and with rnnfast, side by side
# make examples  run all examples in their short form; ARGS="--compare" also times torch.nn
# make test      run the tests on all cores, in a few minutes; ARGS="-k lstm" goes to pytest
# make test-full run every combination, what takes long, and the core tests as on lesser processors
# make test-triton  compile the Triton kernels with the oldest Triton that they are for, which some torch brings along
# make cuda      build rnnfast/_cuda.so, which needs nvcc, but neither a GPU nor a torch that can use one
# make wheel-cuda  a wheel with both libraries, dist/rnnfast-*.whl; CUDA_ARCHS="80 90" names the GPUs that it is for
# make gpu       test and measure on a GPU, in half an hour; ARGS="--minutes 9" goes to bench/gpu_day.py
# make lint      check style and types
# make clean     remove what these made
#
# All of them work in .venv, which the first one makes: it needs Python 3.10 or newer, a C++ compiler and a network.
# PyPI's torch for Linux brings CUDA along (several GB). A machine without a GPU is better served by a CPU build, from
# wherever yours come: `make test TORCH=path/to/torch.whl`. `make clean` before changing PYTHON or TORCH.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=
CUDA_ARCHS ?= 90

VENV := .venv
BIN  := $(VENV)/bin
TEST := $(BIN)/python -m pytest -n auto --durations 20
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

sources := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# The tests of the numbers, on the CPU kernels.
core := $(addprefix tests/test_,recurrence.py modules.py module_db.py errors.py properties.py threads.py)
core += -m "not full" -k "not ([reference or [triton or [cuda)"

.PHONY: demo examples test test-full test-lesser test-triton cells cuda wheel-cuda gpu lint clean

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py $(ARGS)

examples: $(VENV)/installed
	$(BIN)/python examples/run_all.py --short $(ARGS)

test: $(VENV)/installed
	$(TEST) -m "not full" $(ARGS)

test-full: $(VENV)/installed
	$(TEST) $(ARGS)
	$(MAKE) test-lesser test-triton

# As on a processor with AVX2, where this one has more, and on one with SSE4: the kernels, and what torch's libraries
# choose there.
test-lesser: $(VENV)/installed
ifneq ($(shell grep -s -m 1 -o avx512f /proc/cpuinfo),)
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 RNNFAST_TEST_ISA=avx2 $(TEST) $(core)
endif
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 ONEDNN_MAX_CPU_ISA=SSE41 RNNFAST_TEST_ISA=portable \
		$(TEST) $(core)

test-triton: $(VENV)/installed $(VENV)/oldest-triton
	PYTHONPATH=$(VENV)/oldest-triton $(BIN)/python tests/named_gpu.py sm_90
	PYTHONPATH=$(VENV)/oldest-triton $(BIN)/python tests/named_gpu.py sm_90 --flex

cells: $(VENV)/torch
	$(BIN)/python -m rnnfast.codegen

cuda: $(VENV)/torch
	RNNFAST_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace

wheel-cuda: $(VENV)/torch
	RNNFAST_CUDA=1 RNNFAST_CUDA_ARCHS="$(CUDA_ARCHS)" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps \
		--wheel-dir dist .

gpu: $(VENV)/installed
	$(BIN)/python bench/gpu_day.py $(ARGS)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(sources)

clean:
	rm -rf $(VENV) build *.egg-info rnnfast/*.so *.png *.gif
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each file below is a stamp: what it names was done after everything it depends on last changed.

$(VENV)/made:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/oldest-triton: $(VENV)/made
	$(PIP) --no-deps --target $@ triton==3.6.0
	touch $@

$(VENV)/linters: $(VENV)/torch
	$(PIP) ruff clang-format mypy
	touch $@

# torch goes first, because the library is built against its headers and not in an isolated environment with another one.
$(VENV)/torch: constraints.txt $(VENV)/made
	$(PIP) $(TORCH) setuptools wheel ninja
	touch $@

$(VENV)/installed: $(VENV)/torch setup.py pyproject.toml $(sources)
	$(PIP) --no-build-isolation --editable ".[dev,examples]"
	touch $@
