# Everything a user types. Each target makes .venv first when it is not there; nothing else is needed.
PYTHON ?= python3
VENV := .venv# relative: the path of the checkout may have spaces
READY := $(VENV)/.installed
SHELL := bash
QUIET := --quiet --disable-pip-version-check
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_OFFLINE := 1
export PYTHONPATH := $(CURDIR)

# The scripts of an environment name its place: one that was moved with its checkout is made again.
ifeq ($(shell test -e $(READY) && ! grep -qxF "$$(realpath $(VENV))" $(READY) && echo moved),moved)
.PHONY: $(READY)
endif

.PHONY: repro test browser show lint tables readme verify ui tune bench speed spread smoke torture clean lock

repro: $(READY)  ## run every experiment of params.yaml that is not up to date, JOBS at a time, then the report
	python -m pipelines.suite.repro $(if $(JOBS),--jobs $(JOBS)) $(if $(SCHEDULER),--scheduler $(SCHEDULER)) $(if $(CLUSTER),--cluster $(CLUSTER)) $(if $(DASHBOARD),--dashboard) $(if $(DRY),--dry)

test: $(READY)  ## the tests, on all cores
	python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

tables: $(READY)  ## regenerate tables and figures from the committed run records: no weights, no GPU
	python -m pipelines.stages.report

readme: $(READY)  ## for maintainers: reports/ and the generated parts of README.md and docs/, from the committed records
	python -m pipelines.tools.readme

verify: $(READY)  ## whether the run records support every number of the reports and README
	python -m pipelines.tools.verify

tune: $(READY)  ## the same trials of loss weights for every method, on the validation split
	python -m pipelines.tools.tune $(if $(JOBS),--jobs $(JOBS))

bench: $(READY)  ## time and memory of the default benchmark from nothing, in a temporary clone; PACKS=1: of packs, for PAIR=teacher,student
	python tests/bench.py $(if $(PACKS),--packs) $(if $(PAIR),--pair $(PAIR))

speed: $(READY)  ## steps a second and memory of BENCHMARK's protocol on this machine, without its data
	python -m pipelines.tools.speed --benchmark $(or $(BENCHMARK),$(error give a benchmark of params.yaml: make $@ BENCHMARK=streets)) $(if $(BATCH),--batch-size $(BATCH)) $(if $(SIZE),--size $(SIZE))

spread: $(READY)  ## how far a cell of BENCHMARK moves when it is trained again with the same seed, here
	python -m pipelines.tools.spread --benchmark $(or $(BENCHMARK),$(error give a benchmark of params.yaml: make $@ BENCHMARK=streets)) $(if $(METHOD),--method $(METHOD)) $(if $(REPEATS),--repeats $(REPEATS))

browser: $(READY)  ## the page of the reports in Chromium, if it is installed
	python -m pytest -m browser -rs tests/test_browser.py

show: $(READY)  ## open the page of the reports
	python -m webbrowser "file://$(CURDIR)/reports/index.html"

smoke: $(READY)  ## the whole pipeline at a tiny size, in a temporary clone
	python -m pytest -m smoke -n 2 --dist loadfile tests/test_end_to_end.py tests/test_extend.py

torture: $(READY)  ## kills, clusters, damaged files, hostile input: many times each; figures to docs/reliability.md
	ACFD_TORTURE=docs/reliability.md python -m pytest -n auto --maxprocesses 4 --dist worksteal -m torture

ui: $(READY)  ## MLflow's web page
	python -m mlflow ui --backend-store-uri sqlite:///mlflow.db

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

lock: $(READY)  ## renew requirements.lock from pyproject.toml
	uv pip compile pyproject.toml --extra dev --generate-hashes --universal --python-version 3.11 \
	  --no-header --no-annotate --quiet --output-file requirements.lock

clean:  ## remove what can be rebuilt; records, reports, data, weights and resume files stay
	rm -rf .venv mlflow.db mlartifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -type d -prune -exec rm -rf {} +

$(READY): requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed: make PYTHON=python3.11")'
	rm -rf $(VENV)
# The pip that is there, where there is one: to unpack another takes longer than uv needs for all.
	$(PYTHON) -m venv --without-pip $(VENV)
	base="$$($(VENV)/bin/python -c 'import sys; print(sys._base_executable)')"; \
	  PIP_USER=0 "$$base" -m pip --python $(VENV)/bin/python install $(QUIET) uv 2> /dev/null || \
	  { $(VENV)/bin/python -m ensurepip && PIP_USER=0 $(VENV)/bin/python -m pip install $(QUIET) uv; }
	$(VENV)/bin/python -m uv pip install --quiet --python $(VENV)/bin/python pip
	$(VENV)/bin/python -m uv pip install --quiet --python $(VENV)/bin/python --require-hashes -r requirements.lock
# Compiled on two cores before a first run needs it on one.
	for names in segmentation_models_pytorch dvc.repo,dvc.scm,distributed,seaborn,mlflow,sqlalchemy.orm,alembic.command; do \
	  PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -c "import $$names" & done; wait
	realpath $(VENV) > $@
