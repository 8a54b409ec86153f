# From a fresh clone, `make demo` or `make test` does all the set-up and the job.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) $(wildcard build_support/*.py) setup.py pyproject.toml

.PHONY: demo test test-slow nightly soak installs sanitize races memcheck coverage clang
.PHONY: docs bench gpu-check lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m fastsgd demo

# As many tests at a time; auto is one a core.
JOBS ?= auto
test: $(VENV)/built
	$(BIN)/python -m pytest -n $(JOBS)

# What takes minutes or gigabytes: installs into fresh environments, huge tensors.
test-slow: $(VENV)/built
	$(BIN)/python -m pytest -m slow

# --- the proof: CONTRIBUTING.md says what each shows -----------------------------------------------

# Random lives of the optimizers, new ones at each run: so many of each, of 50 acts.
LIVES ?= 300
nightly: $(VENV)/built
	FASTSGD_LIVES=$(LIVES) $(BIN)/python -m pytest tests/test_histories.py -s

soak: $(VENV)/built
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_soak.py

installs: $(VENV)/built
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_install.py

# Builds beside the installed one, each of the variant that it is named after. They are found first,
# in interpreters that tests start too: PYTHONSAFEPATH keeps those from looking where they start.
build/%/built: VARIANT = $*
build/%/built: $(VENV)/built $(shell find fastsgd -name "*.py*")
	FASTSGD_BUILD=$(VARIANT) $(BIN)/python setup.py -q build --build-base build/$* --build-lib build/$*/lib
	@touch $@
with = PYTHONSAFEPATH=1 PYTHONPATH=build/$(1)/lib
preloaded = LD_PRELOAD="$(foreach name,$(1) stdc++,$(shell gcc -print-file-name=lib$(name).so))"
PYTEST := $(BIN)/pytest -p no:cacheprovider --capture=sys

# The core of the suite: what reads and writes memory in every way.
CORE ?= $(patsubst %,tests/test_%.py,averages clearing clip_grad_norm clipping counters device \
    device_extras device_one_pass ema_weights extras faults histories memory properties safety)
sanitize: build/sanitize/built
	$(call with,sanitize) $(call preloaded,asan ubsan) ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=$(UBSAN_OPTIONS) $(PYTEST) -n $(JOBS) $(CORE)
UBSAN_OPTIONS ?= halt_on_error=1:print_stacktrace=1

# One test at a time, as it is the interpreter's exit code that tells of reports.
# Suppressed: what torch's own regions copy, and the loader's freeing of what such a thread had. The
# barriers of torch's runtime are futex calls, which ThreadSanitizer does not see.
# Forks are left out: a child with one thread of several is more than ThreadSanitizer follows.
THREADED ?= tests/test_safety.py tests/test_parity.py tests/test_layouts.py tests/test_averages.py \
    tests/test_clipping.py -k "(thread or share or large_and or long_step or ends_during) and not fork"
races: build/threads/built
	printf "%s\n" race:libtorch_cpu.so race:_dl_deallocate_tls > build/threads/suppressed
	$(call with,threads) $(call preloaded,tsan) setarch -R env \
	  TSAN_OPTIONS=suppressions=build/threads/suppressed $(PYTEST) $(THREADED)

SMALL ?= tests/test_extras.py tests/test_properties.py -k SGD
memcheck: $(VENV)/built
	$(BIN)/python tests/memcheck.py $(SMALL)

# The suite whole, and what of fastsgd/ (with its branches) and of csrc/ it never comes to.
COVERED ?= tests
coverage: build/coverage/built
	rm -f build/coverage/data* build/coverage/failed
	find build/coverage -name "*.gcda" -delete
	$(call with,coverage) $(BIN)/coverage run -m pytest -p no:cacheprovider -n $(JOBS) \
	  $(COVERED) \
	  || touch build/coverage/failed
	$(BIN)/coverage combine -q
	$(BIN)/coverage report
	$(BIN)/gcovr --root . --object-directory build/coverage/objects build/coverage/objects --txt --print-summary
	@test ! -e build/coverage/failed

clang: build/clang/built
	$(call with,clang) $(PYTEST) -n $(JOBS) $(TESTS)
build/clang/built: VARIANT = strict
build/clang/built: export CXX = clang++

docs: $(VENV)/built
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs build/docs

bench: $(VENV)/built
	$(BIN)/python -m fastsgd bench

# In an environment that has a torch with CUDA, of which nothing is changed: no network is needed.
# For the devices that are there, and with the lines that a sanitizer names.
gpu-check:
	FASTSGD_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-native} NVCC_APPEND_FLAGS="$$NVCC_APPEND_FLAGS -lineinfo" \
	  $(PYTHON) -m pip install --disable-pip-version-check -v --no-build-isolation --no-deps -e .
	$(PYTHON) benchmarks/gpu_check.py

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -type f | xargs $(BIN)/clang-format -i

# The torch just installed is the one to build against, and what to build with is there too:
# isolation would only fetch it again at each build.
$(VENV)/built: $(VENV)/$(TORCH) $(SOURCES)
	$(BIN)/pip install --no-build-isolation -e ".[demo,bench,test,examples,docs,dev]"
	@touch $@

# Named after the release, so that another TORCH is another target.
$(VENV)/$(TORCH):
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"fastsgd needs Python 3.10 or newer, and $(PYTHON) is {v[0]}.{v[1]}: name another, as in make PYTHON=python3.12.")'
	$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/torch==*
	$(BIN)/pip install "$(TORCH)" "setuptools>=77.0.3" ninja
	@touch "$@"

clean:
	rm -rf $(VENV) build dist fastsgd.egg-info fastsgd/_build_info.py fastsgd/_C*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
