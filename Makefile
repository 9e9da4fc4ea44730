# Three commands. Each makes its own .venv first (about a minute, once).
#   make demo   base model -> reward model -> SFT and PRFL -> table, interval and picture in runs/demo
#   make test   every test
#   make lint   ruff, with the rules of pyproject.toml
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

demo: .venv/core
	$(BIN)/python train_reward.py --output_dir $(DEMO)/reward --num_samples 4096 --max_train_steps 600
	$(BIN)/python train_align.py --method prfl --max_train_steps 80 --reward $(DEMO)/reward/reward --output_dir $(DEMO)/prfl
	$(BIN)/python train_align.py --method sft --max_train_steps 160 --learning_rate 3e-4 --output_dir $(DEMO)/sft
	$(BIN)/python evaluate.py base=checkpoints sft=$(DEMO)/sft prfl=$(DEMO)/prfl --reward $(DEMO)/reward/reward \
		--num_videos 256 --output_dir $(DEMO)/evaluation

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests

lint: .venv/test
	$(BIN)/ruff check .

.venv/core: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt requirements-wan.txt requirements-label.txt .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.PHONY: demo test lint
