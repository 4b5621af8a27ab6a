# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
# One process per core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup
# The oldest supported Triton and the newest; constraints.txt has one in between.
TRITONS ?= 3.6.0 3.9.0
# How long `make fuzz` goes on.
SECONDS ?= 60
# The tests to repeat on other versions of Triton: kernels' results, recompilation and compiled code.
VERSION_TESTS := $(filter-out $(addprefix tests/kernels/test_,encoder_layer.py every_kernel.py matmul.py tune.py),\
    $(wildcard tests/kernels/test_*.py)) tests/tools/test_quick_interpreter.py

.PHONY: demo test test-all test-tritons distributions fuzz mutants bench bench-gpu report lint format

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,bench]"
	touch $@

demo: .venv/installed
	$(BIN)/python bench/demo.py

test: .venv/installed
	$(PYTEST) --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

# Other versions are in folders that PYTHONPATH puts before .venv. Triton 3.6's interpreter fails with numpy 2.4.
.venv/triton-%/installed: .venv/installed
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(@D) triton==$* $(if $(filter 3.6.%,$*),"numpy<2.4")
	touch $@

# The tests that CI runs; .ci/run also lints and tries the distributions.
test-all: test test-tritons

test-tritons: $(TRITONS:%=.venv/triton-%/installed)
	set -e; for version in $(TRITONS); do \
	    export PYTHONPATH="$(CURDIR)/.venv/triton-$$version"; \
	    $(BIN)/python -c "import triton; print('Triton', triton.__version__); assert triton.__version__ == '$$version'"; \
	    $(PYTEST) $(VERSION_TESTS); \
	done

# The wheel and the sdist, each installed and tried outside of the repository in an environment that had nothing.
distributions: .venv/installed
	rm -rf build dist
	$(BIN)/python -m build
	$(PYTHON) -m venv --clear .venv/distribution
	for each in dist/*.whl "--force-reinstall --no-deps dist/"*.tar.gz; do \
	    .venv/distribution/bin/pip install --quiet --no-compile --constraint constraints.txt $$each && \
	    .venv/distribution/bin/python -I tests/tools/smoke.py || exit; \
	done

# Compare random models, with random changes by users and on random batches, with transformers. Seeds start at the time.
fuzz: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/tools/fuzz.py --seconds $(SECONDS)

# Plant bugs, one at a time. A test must fail for each.
mutants: .venv/installed
	$(BIN)/python tests/tools/mutants.py

bench: .venv/installed
	$(BIN)/pytest bench
	$(BIN)/python bench/report.py

# On a GPU: every suite in 9 minutes, and what did not fit is named. `pytest bench --suite NAMES` runs some without a limit.
# Where the project was copied without its history: make bench-gpu COMMIT=NAME.
bench-gpu: .venv/installed
	$(BIN)/pytest bench --seconds 500 $(if $(COMMIT),--commit $(COMMIT)); status=$$?; $(BIN)/python bench/report.py && exit $$status

# The pages of the records, the picture of a layer's launches, the prediction of a training step, and what every kernel
# compiles to, for every architecture: no GPU is needed.
report: .venv/installed
	$(BIN)/python bench/report.py
	$(BIN)/python bench/launches.py
	$(BIN)/python bench/training_step.py
	$(BIN)/python -m fastbert_kernels.tuning.report > .venv/report.md; status=$$?; \
	    test -s .venv/report.md && mv .venv/report.md bench/results/compiled/README.md && exit $$status

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
