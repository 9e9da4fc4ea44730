# Four commands. Each makes its own .venv first (about a minute, once).
#   make demo   base model -> reward model -> SFT and PRFL -> table, interval and picture in runs/demo
#   make test   every test
#   make lint   ruff, with the rules of pyproject.toml
#   make own    the loop of docs/your_model.md, on a tiny random Wan2.1 and clips of the embedded world: does it all run here?
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

demo: .venv/core
	$(BIN)/python train_reward.py --output_dir $(DEMO)/reward --num_samples 4096 --max_train_steps 500
	$(BIN)/python train_align.py --method prfl --max_train_steps 80 --learning_rate 2e-4 --num_validation 0 \
		--reward $(DEMO)/reward/reward --curated_dir $(DEMO)/curated --output_dir $(DEMO)/prfl
	$(BIN)/python train_align.py --method sft --max_train_steps 160 --learning_rate 3e-4 --num_validation 0 \
		--curated_dir $(DEMO)/curated --output_dir $(DEMO)/sft
	$(BIN)/python evaluate.py base=checkpoints SFT=$(DEMO)/sft PRFL=$(DEMO)/prfl --reward $(DEMO)/reward/reward \
		--num_videos 256 --output_dir $(DEMO)/evaluation

OWN := runs/own
FIT := --size "32*32" --frames 9 --fps 8
FAST := --mixed_precision no --num_validation 4 --validation_steps 2 --checkpointing_steps 2

own: .venv/test
	rm -rf $(OWN)
	$(BIN)/python tests/own.py prepare $(OWN)
	$(BIN)/python sample.py --model $(OWN)/wan/t2v --prompts $(OWN)/prompts.txt --output_dir $(OWN)/samples $(FIT) \
		--num_inference_steps 4
	$(BIN)/python tests/own.py label $(OWN)
	$(BIN)/python label.py report $(OWN)/samples
	$(BIN)/python data.py encode $(OWN)/samples --out $(OWN)/samples_encoded $(FIT) --model $(OWN)/wan/t2v
	$(BIN)/python data.py encode $(OWN)/clips --out $(OWN)/clips_encoded $(FIT) --model $(OWN)/wan/t2v
	$(BIN)/python train_reward.py --model $(OWN)/wan/t2v --data $(OWN)/samples_encoded --fold 1/2 --holdout 2 --depth 1 \
		--max_train_steps 4 --batch_size 4 --mixed_precision no --output_dir $(OWN)/reward
	$(BIN)/python train_reward.py --model $(OWN)/wan/t2v --data $(OWN)/samples_encoded --fold 2/2 --seed 1 --holdout 2 --depth 1 \
		--max_train_steps 4 --batch_size 4 --mixed_precision no --output_dir $(OWN)/judge
	$(BIN)/python train_align.py --model $(OWN)/wan/t2v --data $(OWN)/clips_encoded --reward $(OWN)/reward/reward \
		--judge $(OWN)/judge/reward --patience 3 --lora_rank 4 --num_inference_steps 4 --batch_size 2 --max_train_steps 4 \
		$(FAST) --output_dir $(OWN)/align
	$(BIN)/python evaluate.py --model $(OWN)/wan/t2v --prompts $(OWN)/test.txt base=$(OWN)/wan/t2v prfl=$(OWN)/align \
		--reward $(OWN)/reward/reward --judge $(OWN)/judge/reward $(FIT) --num_inference_steps 4 --output_dir $(OWN)/evaluation
	$(BIN)/python -m formats.wan $(OWN)/align/transformer --out $(OWN)/aligned
	$(BIN)/python -m formats.wan $(OWN)/align/pytorch_lora_weights.safetensors --out $(OWN)/comfyui.safetensors --layout wan

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(PYTEST_FLAGS) tests

lint: .venv/test
	$(BIN)/ruff check .

.venv/core: requirements.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: requirements-test.txt requirements-wan.txt requirements-label.txt .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

.PHONY: demo test lint own
