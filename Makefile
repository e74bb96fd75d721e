# make demo: install, make phantom scans, train, evaluate, print the table.
# make test: install, run the tests. Nothing but Python >= 3.11 is needed for either.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SHARED ?= ../shared
PHANTOMS = data/phantoms
RUN = runs/demo

.PHONY: install lint types test test-slow test-reference parity docs demo clean

install: $(VENV)/installed
$(VENV)/installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

lint: install types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	SKIP=mypy PRE_COMMIT_HOME=$(VENV)/pre-commit $(BIN)/pre-commit run --all-files
	$(BIN)/shellcheck launch/*.sh

types: install
	$(BIN)/python -m mypy

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: install
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations=20

# Needs PyTorch, MONAI and soft-moe-pytorch: pip install -e ".[reference]".
test-reference: install
	$(BIN)/python -m pytest -m reference

parity: install
	$(BIN)/python -m benchmarks.parity --goldens=$(SHARED)/parity

docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	$(BIN)/python -m mkdocs build --strict --site-dir=$(VENV)/site

demo: install
	$(BIN)/python -m swinsmt_jax.phantoms --root=$(PHANTOMS) --cases=80 --val=8 \
		--test=8 --spacing=12 --seed=1 --workers=2
	$(BIN)/python train.py --config=configs/demo.py --workdir=$(RUN)
	$(BIN)/python evaluate.py --workdir=$(RUN) --split=test
	@echo "Picture: $(RUN)/eval_test/overview.png"

clean:
	rm -rf $(VENV) $(PHANTOMS) $(RUN)
