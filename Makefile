# make run    set up, then one sensitivity run through `mlflow run`   (ARGS="-P quant_pair=wint8_afp16")
# make test   set up, then lint, types and tests
# make ui     the MLflow UI on the runs of this folder                 (PORT=5000)
# make lint   ruff and mypy only
# make clean  remove the environment and caches; runs and results stay
# PYTHON=...  the Python 3.11 to build .venv with
PYTHON ?= $(shell command -v python3.11 || echo python3)
PORT ?= 5000
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY ?= true

VENV_PATH := PATH="$(CURDIR)/.venv/bin:$$PATH"
PIP := .venv/bin/python -m pip --disable-pip-version-check
.PHONY: run test ui lint clean
.NOTPARALLEL:

run: .venv/run.stamp
	$(VENV_PATH) mlflow run . --env-manager local --experiment-name layerbits $(ARGS)
	@echo 'Now "make ui" opens the MLflow UI on this run.'

test: lint
	$(VENV_PATH) pytest tests/unit tests/integration

ui: .venv/run.stamp
ifneq ($(filter http%,$(MLFLOW_TRACKING_URI)),)
	@echo 'The runs are on a server: open $(MLFLOW_TRACKING_URI)'
else
	$(VENV_PATH) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  mlflow ui --backend-store-uri "$(MLFLOW_TRACKING_URI)" --port $(PORT) --workers 1
endif

lint: .venv/test.stamp
	$(VENV_PATH) ruff check .
	$(VENV_PATH) ruff format --check .
	$(VENV_PATH) mypy

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last: an environment without one is not complete, and is made anew.
.venv/run.stamp: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { echo \
	  'Python 3.11 is needed and "$(PYTHON)" is not one: install it, or name one with PYTHON=/path/to/python3.11.' >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

.venv/test.stamp: requirements-dev.lock .venv/run.stamp
	$(PIP) install -r requirements-dev.lock
	touch $@
