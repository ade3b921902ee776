# make demo       a small model on real text, from nothing, on two CPU cores
# make pipeline   the same, then instruction tuning, preference tuning, a chat and an evaluation
# make test       the tests, on the CPU; make test-gpu: those of GPU kernels
# make clean      remove what they made (not the environment)

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# On a CPU: huge pages for the logits (50,304 columns, allocated anew at every step), and threads that sleep instead of
# spinning while they wait for each other, without which any other load on the machine slows a run down fivefold.
export THP_MEM_ALLOC_ENABLE = 1
export OMP_WAIT_POLICY = passive

.PHONY: demo pipeline test test-gpu clean

demo: $(VENV)/installed
	$(BIN)/python prepare_data.py configs/data/demo.toml
	$(BIN)/python train.py configs/demo.toml
	$(BIN)/python sample.py --checkpoint runs/demo --max_tokens 100 --temperature 0.7 --seed 1 "Question: What is"
	$(BIN)/python eval_depth.py --checkpoint runs/demo --tokens 4000

pipeline: demo
	$(BIN)/python prepare_data.py configs/data/demo_sft.toml
	$(BIN)/python train.py configs/demo_sft.toml
	$(BIN)/python prepare_data.py configs/data/demo_dpo.toml
	$(BIN)/python train.py configs/demo_dpo.toml
	$(BIN)/python sample.py --checkpoint dpo --max_tokens 60 --temperature 0.3 --seed 1 "What is chemistry?"
	$(BIN)/python evaluate.py perplexity runs/demo_dpo --data data/demo --tokens 2000

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-gpu: $(VENV)/installed-dev
	TEST_GPU=1 $(BIN)/python -m pytest -k "on_cuda or test_attention or test_fp8 or test_kernels"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name it with make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements.txt requirements-dev.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/installed

clean:
	rm -rf data/demo data/demo_sft data/demo_dpo runs/demo runs/demo_sft runs/demo_dpo
