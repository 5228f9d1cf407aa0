# make train     install, then finetune the embedded model (ARGS="key=value ..." changes settings)
# make test      install, then lint, types and tests
# make quick     install, then lint, types and the tests that need neither Ray nor a whole run, up to the first failure
# make test-slow install, then the slower tests: protocol and mirror at every fault, advice against runs, more real runs
# make test-watching  install, then a run watched by a real Prometheus: every panel of the Grafana dashboard has data
# make test-cluster  install, then a run across three hosts that it makes on this machine, and that die (root, 9 minutes)
# make test-chaos install, then the kill matrix: 60 small runs, in each of which one process dies (CHAOS_RUNS=1000: more)
# make test-other-diffusers  install, then a run's LoRA in diffusers 0.31, in an environment of its own (6 GB in build/)
# make install   a virtual environment in .venv with exactly what requirements.lock names
# make help      this list, and every setting of a run

PYTHON ?= python3
ARGS ?=
EXPERIMENT ?= compressibility
VENV := .venv
OTHER := build/other-diffusers
# Named by the lock's content, so that an unchanged lock costs nothing and a changed one installs again.
STAMP := $(VENV)/installed-$(shell cksum < requirements.lock | cut -d' ' -f1)

APART := slow or watching or cluster or other_diffusers  # as in pyproject.toml
FOUR := -n 4 --dist loadfile --no-loadscope-reorder --durations=10

# Some containers set it, and then each of a run's five processes compiles the project again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test quick lint test-slow test-watching test-cluster test-chaos test-other-diffusers install help
.DEFAULT_GOAL := help

train: install
	$(VENV)/bin/python launch.py $(EXPERIMENT) $(ARGS)

test: lint
	$(VENV)/bin/pytest $(FOUR)

quick: lint
	$(VENV)/bin/pytest $(FOUR) -x -m "not (ray or runs or long or $(APART))"

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy .

test-slow: install
	$(VENV)/bin/pytest -m slow -s

test-watching: install
	@command -v prometheus > /dev/null || { echo "prometheus is missing: apt-get install prometheus" >&2; exit 1; }
	$(VENV)/bin/pytest -m watching tests/monitoring/test_watching.py

test-cluster: install
	$(VENV)/bin/python -m tests.cluster.lab
	$(VENV)/bin/pytest -m cluster -s tests/cluster

test-chaos: install
	$(VENV)/bin/python -m tests.chaos.matrix

test-other-diffusers: install $(OTHER)/installed
	$(VENV)/bin/pytest -m other_diffusers -s tests/policy/test_lora_elsewhere.py

$(OTHER)/installed: tests/policy/other_diffusers.txt
	@test -x $(OTHER)/venv/bin/pip || $(PYTHON) -m venv $(OTHER)/venv
	$(OTHER)/venv/bin/pip install --quiet --disable-pip-version-check -r tests/policy/other_diffusers.txt
	@touch $@

install: $(STAMP)

$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11: install a newer one (apt-get install python3) or name it," \
	    "make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "$(PYTHON) cannot make virtual environments: apt-get install python3-venv" >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.lock
	@rm -f $(VENV)/installed-*
	@touch $@

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile
	@test ! -e $(STAMP) || { echo; $(VENV)/bin/python launch.py --help; }
