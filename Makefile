# make demo    train on scikit-learn's digits: float, LAQ and BLAQ at 1 bit, 3 seeds each
# make test    lint, types and all tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test format bench clean

demo: .venv/installed
	$(BIN)/blaq compare demo --methods float,laq,blaq --seeds 3 --out runs/demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python benchmarks/step.py --out docs/results
	$(BIN)/python benchmarks/step.py --weights 1048576 4194304 99999744 --foreach --out docs/results/step-large
	$(BIN)/python benchmarks/step_figure.py
	$(BIN)/python benchmarks/memory.py --out docs/results
	$(BIN)/python benchmarks/data.py --out docs/results
	$(BIN)/python benchmarks/epoch.py mnist-lenet5 --out docs/results
	$(BIN)/python benchmarks/whole_epoch.py mnist-lenet5 --set data.train=25000 --set data.validation=5000 --bits 1 --out docs/results
	$(BIN)/python benchmarks/probes.py --out docs/results
	$(BIN)/python benchmarks/packing.py --out docs/results

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
