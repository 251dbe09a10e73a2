# Targets for a fresh machine with Python >= 3.11 and make. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SAMPLE ?= 20
PROCESSES ?= 2
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements.lock

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-live test-optimised mutation lint format types docs lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "Another Python: make PYTHON=python3.12 demo"

install: $(VENV)/.installed ## Create .venv and install the package into it

demo: $(VENV)/.installed ## Train configs/tiny.yaml on 8 simulated devices into a new directory in runs/
	@run=runs/demo; n=1; \
	while [ -e "$$run" ]; do n=$$((n + 1)); run=runs/demo-$$n; done; \
	echo "The run goes to $$run"; \
	$(BIN)/moe-jax train configs/tiny.yaml --run-dir "$$run"

test: $(VENV)/.installed-dev ## Run the tests, without the slow ones, whose subject the others cover
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile -m "not slow"

test-all: $(VENV)/.installed-dev ## Run all tests but test-live, and show which took longest
	@$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --durations=15 --ignore=tests/hf/test_live.py

test-live: $(VENV)/.installed-torch ## Compare with transformers itself, for which torch is installed
	@$(BIN)/python -m pytest tests/hf/test_live.py

test-optimised: $(VENV)/.installed-dev ## Run the tests of what is computed with the compiler as users have it
	@OPTIMISED=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile tests/ops tests/moe/test_layer.py tests/hf/test_logits.py

mutation: $(VENV)/.installed-dev ## Plant faults and list those that no test notices: SAMPLE=20 per room (all: many hours)
	@$(BIN)/python scripts/mutate.py --sample $(SAMPLE)

lint: $(VENV)/.installed-dev ## Check style and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Correct style and formatting in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## Check types
	@$(BIN)/mypy

docs: $(VENV)/.installed-dev ## Write docs/configuration.md from the configuration types
	@$(BIN)/python scripts/config_docs.py
	@$(BIN)/python scripts/serving_docs.py

lock: ## Write requirements.lock from a new resolution of pyproject.toml
	@lock=$$(mktemp -d) && $(PYTHON) -m venv "$$lock" && "$$lock/bin/pip" install -qq '.[dev]' && \
	{ grep '^#' requirements.lock; "$$lock/bin/pip" freeze --exclude moe-jax | LC_ALL=C sort -f; } > requirements.new && \
	mv requirements.new requirements.lock && rm -rf "$$lock"

clean: ## Delete .venv and caches; never runs/
	@rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './runs/*' -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed: install Python 3.11 or later, or name another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1), but 3.11 or later is needed: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) -m venv failed: install its venv module (Debian and Ubuntu: python3-venv)" >&2; rm -rf $(VENV); exit 2; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml requirements.lock
	@echo "Installing moe-jax and its dependencies (about a minute)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml requirements.lock
	@echo "Installing moe-jax with its development tools (about a minute)"
	@$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-torch: $(VENV)/.installed-dev
	@echo "Installing torch (up to 2 GB where the index has no CPU build)"
	@$(INSTALL) -e '.[dev,torch]' || { echo "make: torch cannot be installed here, so transformers itself was not run: see the torch extra in pyproject.toml" >&2; exit 1; }
	@touch $@
