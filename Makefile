# Every target makes .venv when it is missing or out of date, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
NATIVE := .venv/.native
READY := $(STAMP) $(NATIVE)

# Triton looks at this when a kernel is defined: interpreted and compiled kernels need a process each.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -p no:cacheprovider

.PHONY: demo test test-slow test-cuda test-cuda-memory lint types bench bench-cuda bench-thresholds \
    bench-logging bench-distributed pictures wheel clean

demo: $(READY)
	$(BIN)/python -m gradclip demo

# The engines meanwhile, the interpreted kernels first, and their output at the end.
test: $(READY)
	@log=$$(mktemp); { $(INTERPRETED) -m "interpreted and not slow" tests/engines; failed=$$?; \
	$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow" tests/engines && exit $$failed; \
	} >$$log 2>&1 & other=$$!; \
	$(BIN)/python -m pytest -q -m "not slow" --ignore tests/engines; failed=$$?; \
	wait $$other || failed=1; echo "Engines:"; tail -n 90 $$log; rm $$log; exit $$failed

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow
	$(INTERPRETED) -m "interpreted and slow" tests/engines

# On a machine with a CUDA device; PYTHON_CUDA is one that has torch, Triton and pytest.
PYTHON_CUDA ?= python3
test-cuda:
	$(PYTHON_CUDA) -m pytest -q -m cuda

# The same kernels, with every address they touch checked.
test-cuda-memory:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
	    $(PYTHON_CUDA) -m pytest -q -m "cuda and not slow" tests/engines

bench-cuda:
	$(PYTHON_CUDA) -m benchmarks.cuda

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Counts instructions too, where valgrind is there.
bench: $(READY)
	$(BIN)/python -m benchmarks.clip --instructions

# timm wants torchvision, of which its one file for AGC needs nothing.
bench-thresholds: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
	    autoclip zclip smartclip timm
	$(BIN)/python -m benchmarks.thresholds

bench-logging: $(READY)
	$(BIN)/python -m benchmarks.logging

bench-distributed: $(READY)
	$(BIN)/python -m benchmarks.distributed --save benchmarks/results/distributed.md

# Those of the README that come from a demo run; wants chromium and chromedriver.
pictures: $(READY)
	$(BIN)/python -m docs.pictures

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# Written last, so that an interrupted install is begun again.
$(STAMP): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv 2>/dev/null || { \
	    rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && \
	    $(PYTHON) -m pip --python .venv/bin/python install pip; \
	} || { echo "No pip for .venv: install your system's python3-venv or python3-pip." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(NATIVE)

# The library of the native engine, anew when its source is newer.
$(NATIVE): setup.py $(wildcard gradclip/engines/_native*.[ch]) | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f gradclip/engines/_native.so
