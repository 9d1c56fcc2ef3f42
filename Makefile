# Each target sets up what it needs. PYTHON makes the virtual environment, VENV is where it lies: what
# commands of llmrl need, and for developers the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
LOWEST ?= .venv-lowest
BEYOND_LOWEST := test_repo.py test_curve.py test_notebooks.py test_many_processes.py reports/test_trackers.py \
    optim/test_deepspeed.py distributed/test_context.py distributed/test_launch.py docs golden rollout/test_cache.py \
    rollout/test_support.py rollout/test_layers.py rollout/test_rope.py
ARITHMETIC := data/arithmetic/train.jsonl
SFT_MODEL := runs/quickstart/sft/final
REVIEWS := data/reviews/train.jsonl
REVIEWER := runs/reviews_tiny/sft/final
REWARD_MODEL := runs/reviews_tiny/reward_model/final
RLHF := recipes/reviews_tiny_ppo.yaml
PEERS := .peers/trl-1.16.0 .peers/trl-1.12.0
MODEL ?= runs/bench/SmolLM2-135M-Instruct
WORKLOADS ?=
RELIABILITY_TABLE ?= runs/reliability.jsonl
TURNS ?= 2
DTYPE ?= bfloat16

.PHONY: quickstart quickstart-rlhf test test-fast test-lowest test-reliability fuzz check docs site bench

# Trains a tiny model to add, by GRPO, on a laptop CPU: scores before and after. Interrupted, it goes on where it was.
quickstart: $(ARITHMETIC) $(SFT_MODEL)
	$(BIN)/llmrl evaluate recipes/quickstart_grpo.yaml --output runs/quickstart/before.json
	$(BIN)/llmrl grpo recipes/quickstart_grpo.yaml
	$(BIN)/llmrl evaluate recipes/quickstart_grpo.yaml model.path=runs/quickstart/grpo/final \
	    --output runs/quickstart/after.json --compare runs/quickstart/before.json
	@echo "model runs/quickstart/grpo/final, metrics runs/quickstart/grpo/metrics.jsonl, samples runs/quickstart/grpo/samples.jsonl"
	@echo "ask it:  $(BIN)/llmrl generate runs/quickstart/grpo/final 47+85="

$(ARITHMETIC): | $(INSTALLED)
	$(BIN)/python data/arithmetic/generate.py

$(SFT_MODEL): | $(INSTALLED) $(ARITHMETIC)
	$(BIN)/llmrl sft recipes/quickstart_sft.yaml

# The whole story of RLHF on a laptop CPU: supervised start, reward model, PPO with four models. Interrupted, it goes on.
quickstart-rlhf: $(REVIEWS) $(REWARD_MODEL)
	$(BIN)/llmrl evaluate $(RLHF) --output runs/reviews_tiny/before.json
	$(BIN)/llmrl ppo $(RLHF)
	$(BIN)/llmrl evaluate $(RLHF) model.path=runs/reviews_tiny/ppo/final \
	    --output runs/reviews_tiny/after.json --compare runs/reviews_tiny/before.json
	@echo "score/model is what the reward model says, score/true_warmth the hidden truth; what it cost is kl/sequence, in nats:"
	@tail -n 1 runs/reviews_tiny/ppo/metrics.jsonl | grep -o '"kl/sequence": [-0-9.e]*'
	@echo "report card $(REWARD_MODEL)/report_card.json, samples runs/reviews_tiny/ppo/samples.jsonl"
	@echo "ask it:  $(BIN)/llmrl generate runs/reviews_tiny/ppo/final 'the little cafe by the sea:' --temperature 1"

$(REVIEWS): | $(INSTALLED)
	$(BIN)/python data/reviews/generate.py

$(REVIEWER): | $(INSTALLED) $(REVIEWS)
	$(BIN)/llmrl sft recipes/reviews_tiny_sft.yaml

$(REWARD_MODEL): | $(REVIEWER)
	$(BIN)/llmrl reward-model recipes/reviews_tiny_reward_model.yaml

# Two workers with one thread each, so that they do not fight for the cores.
test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-fast: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# The lowest versions that pyproject.toml allows, in an environment of their own; without what needs
# other extras, without caches and models that newer versions of transformers brought, and without numbers
# that other versions gave.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest tests -m "not slow" $(BEYOND_LOWEST:%=--ignore=tests/%)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -e ".[math]" pytest beartype hypothesis tokenizers -c constraints-lowest.txt
	touch $@

# Faults in folders, data, templates, settings and rules, 400 combinations; make test tries 60 of them.
fuzz: $(DEV)
	FUZZ_COMBINATIONS=$${FUZZ_COMBINATIONS:-400} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/test_fuzz.py

# Kills, signals, damage and foreign folders, 1,400 trials and a soak of ten minutes: about an hour; make test tries a
# sample. The table gets a line for each trial.
test-reliability: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.reliability --table $(RELIABILITY_TABLE)

check: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The page of metrics, from their catalogue.
docs: $(DEV)
	$(BIN)/python docs/metrics.py

# The site of the documentation, in site/: open site/index.html, or `$(BIN)/mkdocs serve` while writing.
site: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The short set beside transformers and TRL, and the table of docs/figures.md from all results; for others
# make bench WORKLOADS="W6 W7", see benchmarks/bench.py. MODEL is a folder; TURNS is how often each side is measured.
# DTYPE=float32 where the processor has no bfloat16 (neither avx512_bf16 nor amx_bf16), which it would only emulate.
bench: $(DEV) $(PEERS) $(MODEL)
	$(BIN)/python benchmarks/bench.py $(MODEL) $(WORKLOADS) --turns $(TURNS) --dtype $(DTYPE)

# Each version of TRL in a folder of its own: it changes nothing that llmrl uses.
.peers/trl-%: | $(DEV)
	$(BIN)/python -m pip install --no-deps --target $@ trl==$*

runs/bench/SmolLM2-135M-Instruct: | $(DEV)
	$(BIN)/hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("llmrl needs Python 3.11 or newer, and this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch -c constraints.txt
	$(BIN)/python -m pip install -e . -c constraints.txt
	touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	touch $@
