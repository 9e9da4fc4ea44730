# Four commands. Each makes its own .venv first (about a minute, once).
#   make demo   base model -> reward model -> SFT and PRFL -> table, interval and picture in runs/demo
#   make test   every test
#   make lint   ruff, with the rules of pyproject.toml
#   make own    the walk of docs/your_model.md, on a tiny random Wan2.1 and clips of the embedded world; then a
#               short one on Wan2.2 TI2V-5B and A14B. `make own-Wan2.1` or `make own-Wan2.2-A14B` is one of them
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo

demo: .venv/core
	$(BIN)/python train_reward.py --output_dir $(DEMO)/reward --num_samples 4096 --max_train_steps 500
	$(BIN)/python train_align.py --method prfl --max_train_steps 160 --num_validation 0 \
		--reward $(DEMO)/reward/reward --curated_dir $(DEMO)/curated --output_dir $(DEMO)/prfl
	$(BIN)/python train_align.py --method sft --max_train_steps 320 --learning_rate 3e-4 --num_validation 0 \
		--curated_dir $(DEMO)/curated --output_dir $(DEMO)/sft
	$(BIN)/python evaluate.py base=checkpoints SFT=$(DEMO)/sft PRFL=$(DEMO)/prfl --reward $(DEMO)/reward/reward \
		--num_videos 256 --output_dir $(DEMO)/evaluation

# The lines of docs/your_model.md. Only sizes differ, and tests/own.py answers in place of people.
# tests/test_docs.py compares them.
OWN := runs/own
HERE := ../..
RUN := cd $(OWN) && PYTHONPATH=$(HERE) $(HERE)/$(BIN)/python
PEOPLE := $(HERE)/tests/own.py answer
SIZE := --size "32*32" --frames 9 --fps 8
STEPS := --num_inference_steps 4
REWARD := --depth 1 --holdout 2 --max_train_steps 4 --batch_size 4 --mixed_precision no
ALIGN := --batch_size 2 --max_train_steps 4 --mixed_precision no --num_validation 4 --checkpointing_steps 2 \
	$(STEPS)

OWN_22 := own-Wan2.2-TI2V-5B own-Wan2.2-A14B
own: own-Wan2.1 $(OWN_22)

own-prepare: .venv/test
	rm -rf $(OWN)
	$(BIN)/python tests/own.py prepare $(OWN)

own-Wan2.1: own-prepare
	$(RUN) $(HERE)/data.py check clips $(SIZE) --model Wan2.1
	$(RUN) $(HERE)/data.py encode clips --out clips_encoded $(SIZE) --model Wan2.1
	$(RUN) $(HERE)/sample.py --model Wan2.1 --prompts prompts.txt --output_dir samples $(SIZE) $(STEPS)
	$(RUN) $(PEOPLE) $(HERE)/label.py samples --annotator ada
	$(RUN) $(HERE)/label.py report samples
	$(RUN) $(HERE)/data.py encode samples --out samples_encoded $(SIZE) --model Wan2.1
	$(RUN) $(HERE)/train_reward.py --model Wan2.1 --data samples_encoded --fold 1/2 --output_dir runs/reward \
		--gradient_checkpointing $(REWARD)
	$(RUN) $(HERE)/train_reward.py --model Wan2.1 --data samples_encoded --fold 2/2 --seed 1 \
		--output_dir runs/judge --gradient_checkpointing $(REWARD)
	$(RUN) $(HERE)/train_align.py --model Wan2.1 --data clips_encoded --reward runs/reward/reward \
		--judge runs/judge/reward --validation_steps 2 --patience 3 --gradient_checkpointing $(ALIGN)
	$(BIN)/python tests/own.py best $(OWN)/runs/align
	$(RUN) $(HERE)/evaluate.py --model Wan2.1 --prompts test.txt base=Wan2.1 prfl=runs/align/best \
		--reward runs/reward/reward --judge runs/judge/reward $(SIZE) $(STEPS)
	$(RUN) $(PEOPLE) $(HERE)/label.py --pairs runs/evaluate/base runs/evaluate/prfl --annotator ada
	$(RUN) $(HERE)/label.py report runs/evaluate/base
	$(RUN) $(HERE)/sample.py --model Wan2.1 --transformer runs/align/best/transformer --prompts prompts2.txt \
		--output_dir samples2 $(SIZE) $(STEPS)
	$(RUN) $(PEOPLE) $(HERE)/label.py samples2 --annotator ada
	$(RUN) $(HERE)/data.py encode samples2 --out samples2_encoded $(SIZE) --model Wan2.1
	$(RUN) $(HERE)/train_reward.py --model Wan2.1 --data samples_encoded samples2_encoded --fold 1/2 \
		--output_dir runs/reward2 --gradient_checkpointing $(REWARD)
	$(RUN) $(HERE)/train_reward.py --model Wan2.1 --data samples_encoded samples2_encoded --fold 2/2 --seed 1 \
		--output_dir runs/judge2 --gradient_checkpointing $(REWARD)
	$(RUN) $(HERE)/train_align.py --model Wan2.1 --data clips_encoded --reward runs/reward2/reward \
		--judge runs/judge2/reward --validation_steps 2 --patience 3 --gradient_checkpointing \
		--output_dir runs/align2 $(ALIGN)
	$(BIN)/python tests/own.py best $(OWN)/runs/align2
	$(RUN) -m formats.wan runs/align2/best/transformer --out Wan2.1-aligned
	$(RUN) $(HERE)/train_align.py --model Wan2.1 --data clips_encoded --reward runs/reward2/reward \
		--judge runs/judge2/reward --validation_steps 2 --patience 3 --gradient_checkpointing \
		--lora_rank 16 --learning_rate 5e-5 --output_dir runs/adapters $(ALIGN)
	$(BIN)/python tests/own.py best $(OWN)/runs/adapters
	$(RUN) -m formats.wan runs/adapters/best/pytorch_lora_weights.safetensors --out comfyui.safetensors --layout wan

$(OWN_22): own-%: own-prepare
	$(RUN) $(HERE)/data.py encode clips --out runs/$*/clips_encoded $(SIZE) --model $*
	$(RUN) $(HERE)/sample.py --model $* --prompts prompts.txt --output_dir runs/$*/samples $(SIZE) $(STEPS)
	$(RUN) $(PEOPLE) $(HERE)/label.py runs/$*/samples --annotator ada
	$(RUN) $(HERE)/data.py encode runs/$*/samples --out runs/$*/samples_encoded $(SIZE) --model $*
	$(RUN) $(HERE)/train_reward.py --model $* --data runs/$*/samples_encoded --output_dir runs/$*/reward $(REWARD)
	$(RUN) $(HERE)/train_align.py --model $* --data runs/$*/clips_encoded --reward runs/$*/reward/reward \
		--output_dir runs/$*/align $(ALIGN)
	$(RUN) $(HERE)/evaluate.py --model $* --prompts test.txt base=$* prfl=runs/$*/align \
		--reward runs/$*/reward/reward --output_dir runs/$*/evaluate $(SIZE) $(STEPS)
	$(RUN) -m formats.wan runs/$*/align --out runs/$*/aligned

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

.PHONY: demo test lint own own-prepare own-Wan2.1 $(OWN_22)
