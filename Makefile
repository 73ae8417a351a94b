SHELL := bash
.SHELLFLAGS := -o pipefail -c

# The environment is built once and rebuilt only when its pins change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup study test test-all lint notebooks bench soak ui docs clean

setup: $(READY)

# uv, itself fetched by pip, installs everything in a quarter of pip's time.
$(READY): pyproject.toml constraints.txt
	@echo 'Making $(VENV) with PyTorch, MLflow and all else (6 GB): one to several minutes, once.'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -c constraints.txt -e '.[dev]' 2>&1 \
		| awk '!/^ [-+~] / { print; fflush() }'
	@touch $(READY)

study: $(READY)
	$(BIN)/python -m studies.kl_weight

# Three processes for two cores, a test module each: many tests wait for a server or a study that they
# started. In the order of tests/conftest.py, which puts the longest modules first.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ''

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Of the studies in mlflow.db, or where MLFLOW_TRACKING_URI is.
notebooks: $(READY)
	$(BIN)/python -c 'import sys; from nbclient import execute; from nbformat import read, write; \
		[write(execute(read(path, 4), record_timing=False), path) for path in sys.argv[1:]]' analysis/*.ipynb

bench: $(READY)
	$(BIN)/python -m benchmarks.throughput --data-dir $(or $(DATA_DIR),data)

soak: $(READY)
	$(BIN)/python -m benchmarks.soak --kills $(or $(KILLS),300)

# Without MLflow's workers for GenAI jobs, seven processes, the page is there in half the time.
UI_ENV := MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	MLFLOW_LOGGING_LEVEL=ERROR PYTHONWARNINGS=ignore
PORT ?= 5000
UI := http://127.0.0.1:$(PORT)/\#/experiments?workflowType=machine_learning

ui: $(READY)
	@if (: < /dev/tcp/127.0.0.1/$(PORT)) 2> /dev/null; then \
		echo 'Port $(PORT) is taken, by another page perhaps; choose another: make ui PORT=5001'; exit 2; fi
	@echo 'In some seconds: $(UI) (Ctrl-C stops it)'
	@$(UI_ENV) $(BIN)/mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 \
		--uvicorn-opts '--log-level warning'

# Building needs no network; the first time, its tools are installed. Under --quiet mkdocs counts no
# warnings, so its lines stay.
docs: $(VENV)/.docs
	$(BIN)/python docs/walk.py > $(VENV)/walk.svg && mv $(VENV)/walk.svg docs/how-a-study-runs.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'Documentation: site/index.html; with its search: $(BIN)/python -m http.server -b 127.0.0.1 -d site'

$(VENV)/.docs: $(READY)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
