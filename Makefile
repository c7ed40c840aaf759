# One environment, .venv, made on first use and renewed when its requirements change.
#
#   make test     style, types, tests
#   make lint     style and types only
#   make docs     the site, into out/docs; a warning is an error
#   make demo     why switch from MAML: a table and a picture, in a minute (DEMO=--help lists more)
#   make bench    the quick measurements (minutes), into out/; then README's ratios beside them
#   make matrix   the tests with other arithmetic, Pythons, torches (hours, tens of GB; not in CI)
#   make clean    remove everything made here, the environment too
#
# PYTHON=python3.12 picks another interpreter, PYTEST="-x -k lam" other tests.

PYTHON ?= python3
PYTEST ?= --numprocesses auto --maxprocesses 8
DEMO ?= --out demo

# With fewer repeats than what is published: under 15 minutes.
BENCH := adaptation certificates,--problems,20 adaptive,--problems,60 floor,--seconds,30 \
         batched memory figure2 stopped_training,--seeds,1,--lengths,1

VERSION := $(shell $(PYTHON) -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null)
VENV := .venv
BIN := $(VENV)/bin
CREATED := $(VENV)/python-$(VERSION)
READY := $(VENV)/ready
SAY := @printf '== %s\n'

.PHONY: test lint docs demo bench matrix clean

# Each process has one torch thread: for small tensors, more of them only wait for each other.
test: lint
	$(SAY) 'tests: pytest $(PYTEST)'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

lint: $(READY)
	$(SAY) 'style: ruff check, ruff format --check'
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	$(SAY) 'types: mypy'
	@$(BIN)/mypy

docs: $(READY)
	$(SAY) 'site: sphinx, docs/ into out/docs'
	@$(BIN)/python -m sphinx -qW --keep-going docs out/docs

demo: $(READY)
	$(SAY) 'demo: examples/demo.py $(DEMO)'
	@$(BIN)/python examples/demo.py $(DEMO)

bench: $(READY)
	$(SAY) 'measurements into out/ (the others need data, peers or time: see benchmarks/README.md)'
	@for run in $(BENCH); do set -- $$(echo $$run | tr , ' '); script=$$1; shift; \
	  $(BIN)/python benchmarks/$$script.py --out out $$* || exit 1; done
	$(SAY) 'what README claims, and what was measured now'
	@$(BIN)/python benchmarks/claims.py --out out

matrix: $(READY)
	@$(BIN)/python tests/matrix.py $(MATRIX)

$(READY): $(CREATED) pyproject.toml .ci/requirements.txt
	$(SAY) 'environment 2/2: torch, learn2learn and the rest (the first time several GB and minutes)'
	@$(BIN)/python -m pip install -qq --requirement .ci/requirements.txt
	@touch $@

# The library needs Python >= 3.10; learn2learn's qpth needs numpy < 2, without wheels for 3.13.
$(CREATED):
	@case '$(VERSION)' in 3.10|3.11|3.12) ;; *) \
	  echo 'the tests and the demo need Python 3.10, 3.11 or 3.12 (for learn2learn);' \
	       '"$(PYTHON)" is "$(VERSION)". Try: make PYTHON=python3.12'; exit 1;; esac
	$(SAY) 'environment 1/2: $(VENV) with Python $(VERSION)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --upgrade 'pip>=23.1'
	@touch $@

clean:
	rm -rf $(VENV) build dist out demo *.egg-info .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
