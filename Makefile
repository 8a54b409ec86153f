# From a fresh clone, `make demo` or `make test` does all the set-up and the job.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) $(wildcard build_support/*.py) setup.py pyproject.toml

.PHONY: demo test test-slow nightly soak installs docs bench gpu-check lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(BIN)/python -m fastsgd demo

test: $(VENV)/built
	$(BIN)/python -m pytest

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

docs: $(VENV)/built
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs build/docs

bench: $(VENV)/built
	$(BIN)/python -m fastsgd bench

# In an environment that has a torch with CUDA, of which nothing is changed: no network is needed.
gpu-check:
	FASTSGD_CUDA=1 $(PYTHON) -m pip install --no-build-isolation --no-deps -e .
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
