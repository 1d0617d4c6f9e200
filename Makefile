# `make up` starts mintweb, `make test` runs every check and test; both work on a fresh machine.

.DEFAULT_GOAL := help
.PHONY: help up test check format bench chaos chaos-full faults-full sweep mutations proto clean dev sdk-envs chromium vllm-env
VENV ?= .venv
VLLM_ENV ?= .venv-vllm
PY = $(VENV)/bin/python
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-input
CHECK_ENV = MINTWEB_DATA_DIR=.cache/check
JOBS ?= 3
SEED ?= 1
KILLS ?= 100
ZOMBIES ?= 20
FAULTS ?= 20
ENGINE ?= chain
SOURCES = manage.py mintweb runs gpuworker tests

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' Makefile | expand -t 20

up: $(VENV)/.installed ## Start everything in the foreground; Ctrl-C stops it
	@exec $(PY) manage.py up

test: dev chromium sdk-envs ## Run all checks and all tests, JOBS files at a time (ARGS="tests/api -k name" for some)
	@$(MAKE) --no-print-directory check
	$(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: dev ## Check format, lint, types, import contracts and migrations
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(CHECK_ENV) $(PY) -m mypy $(SOURCES)
	$(VENV)/bin/lint-imports
	$(CHECK_ENV) $(PY) -W ignore::RuntimeWarning manage.py makemigrations --check --dry-run

format: dev ## Format the code and repair what lint can repair
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(VENV)/.installed-bench sdk-envs ## Measure speed on an instance of its own (ARGS="--help" for the choices)
	$(PY) -m bench.run $(ARGS)

chaos: dev ## Kill, freeze and starve everything under load, then count what was lost (SEED=1 KILLS=100 ZOMBIES=20 FAULTS=20 ENGINE=chain)
	$(PY) -m tests.chaos --seed $(SEED) --kills $(KILLS) --zombies $(ZOMBIES) --faults $(FAULTS) --engine $(ENGINE) $(ARGS)

chaos-full: dev ## The same for longer: 1,200 faults over 100,000 operations, then 360 while real adapters train
	$(PY) -m tests.chaos --seed $(SEED) --kills 1000 --zombies 100 --faults 100 --ops 100000
	$(PY) -m tests.chaos --seed $(SEED) --kills 300 --zombies 30 --faults 30 --engine torch --runs 4

faults-full: dev sdk-envs ## The faults under an unmodified client, with databases away for a minute and more restarts
	FAULTS=full $(PY) -m pytest tests/e2e/test_faults.py tests/e2e/test_partitions.py tests/e2e/test_full_disks.py \
		-o log_cli=true -o log_cli_level=INFO $(ARGS)

sweep: dev ## Break every call to PostgreSQL, the disk and Redis, one at a time, in each way (ARGS="--every 41" for some)
	$(PY) -m tests.chaos.sweep --jobs 4 $(ARGS)

mutations: dev ## Take each protection away in a copy of the tree and see its tests fail
	$(PY) -m tests.chaos.mutations $(ARGS)

proto: dev ## Make runs/schemas/tinker_pb2.py again from its .proto file
	$(PY) -m grpc_tools.protoc --proto_path=runs/schemas --python_out=runs/schemas --pyi_out=runs/schemas tinker.proto

clean: ## Remove caches and build outputs (not data, not .venv)
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build staticfiles
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

dev: $(VENV)/.installed-dev

# The published client packages, each in an environment of its own.
sdk-envs: dev
	@PYTHON=$(PY) bash tests/sdk/make_envs.sh

chromium:
	@sh .ci/chromium

vllm-env: ## Install vLLM for CPUs into .venv-vllm, for the tests that need a real server
	@test -x $(VLLM_ENV)/bin/python || python3 -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --disable-pip-version-check -r tests/worker/vllm/requirements.txt
	@# Those that come along are built for GPUs and do not load beside a torch for CPUs; texts need none.
	$(VLLM_ENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec

# A stamp per requirements file: a second run installs nothing.
$(VENV)/.installed: requirements.txt $(VENV)/.made
	@echo "Installing mintweb's requirements into $(VENV) (the first time this takes minutes) ..."
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV) ..."
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

$(VENV)/.installed-bench: bench/requirements.txt $(VENV)/.installed-dev
	@echo "Installing what the benchmarks need into $(VENV) ..."
	@$(PIP_INSTALL) -r bench/requirements.txt
	@touch $@

$(VENV)/.made:
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			$$python -m venv $(VENV) && touch $@ && exit 0; \
			echo "make: $$python cannot make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
		fi; \
	done; \
	echo "make: Python 3.11 or newer is needed; none of python3, python3.14 ... python3.11 is that" >&2; exit 1
