"""Every flag of the training scripts does something; every script's flags are refused where they do nothing.

ACTS holds, for each flag, a run of tiny.RUNS in which it acts, with a value: what that run leaves behind, or
what it calls, must be another than without the flag. A flag that is missing here fails the test: say what it
does.
"""
import dataclasses
import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_house import FILES
from tiny import RUNS, command, generator, metrics, one_line, run, weights, write_data

import common
import data
import evaluate
import label
import model
import sample
import search
import train_align
import train_reward
from formats import runs, wan
from formats import weights as formats_weights
from formats.weights import save_module
from pavrm import PAVRM
from scale import lora, plan
from study import candidates, cost, node, parts, reproduce, resampling, samples, why
from world import clips, pretrain
from world.vae import VideoVAE

pytestmark = pytest.mark.usefixtures("cpu")
WORLD = ("--data", "")                                          # the last of two counts: without --data
ACTS = {"train_align": {
    "method": ("sft", "--method rwr --num_samples 8 --num_inference_steps 2"), "task": ("sft", "--task i2v"),
    "model": ("sft", "--model {folder}/other/model"), "reward": ("prfl", "--reward {folder}/other/reward"),
    "data": ("sft", "--data {folder}/other/data"), "output_dir": ("sft", "--output_dir {folder}/elsewhere"),
    "world": ("world", "--world small"), "num_curated": ("world", "--num_curated 20"),
    "curated_dir": ("world", "--curated_dir x"),
    "num_samples": ("rwr", "--num_samples 9"), "num_inference_steps": ("prfl", "--num_inference_steps 7"),
    "shift": ("prfl", "--shift 3"), "reward_weight": ("prfl", "--reward_weight 2"),
    "recipe": ("prfl", "--recipe steady"),
    "rollout_passes": ("prfl", "--rollout_passes 1"),
    "reward_loss": ("prfl", "--reward_loss logsigmoid"),
    "trajectory_part": ("prfl", "--trajectory_part late"),
    "frames_decoded": ("refl", "--frames_decoded all"),
    "decoder_checkpointing": ("refl", "--decoder_checkpointing"), "sft_updates": ("prfl", "--no-sft_updates"),
    "group_size": ("nft", "--group_size 4"), "inner_updates": ("nft", "--inner_updates 1"),
    "advantage_clip": ("nft", "--advantage_clip 0.5"), "nft_reward": ("nft", "--nft_reward probability"),
    "nft_beta": ("nft", "--nft_beta 2"), "old_decay": ("nft", "--old_decay 0"),
    "noise_level": ("grpo", "--noise_level 0.3"), "clip_range": ("grpo", "--clip_range 1e-9"),
    "kl_weight": ("grpo", "--kl_weight 0"),
    "context_dropout": ("sft", "--context_dropout 0.9"), "learning_rate": ("sft", "--learning_rate 1e-3"),
    "lr_scheduler": ("sft", "--lr_scheduler linear"),
    "weight_decay": ("sft", "--weight_decay 9"), "max_train_steps": ("sft", "--max_train_steps 1"),
    "batch_size": ("sft", "--batch_size 4"),
    "gradient_accumulation_steps": ("sft", "--gradient_accumulation_steps 2"),
    "max_grad_norm": ("sft", "--max_grad_norm 1e-9"), "mixed_precision": ("sft", "--mixed_precision bf16"),
    "lora_rank": ("sft", "--lora_rank 2"), "lora_alpha": ("lora", "--lora_alpha 9"),
    "lora": ("sft", "--lora {folder}/other/pytorch_lora_weights.safetensors"),
    "export": ("lora", "--export lora"),
    "checkpointing_steps": ("sft", "--checkpointing_steps 1"), "keep": ("kept", "--keep 1"),
    "validation_steps": ("watched", "--validation_steps 1"),
    "num_validation": ("watched", "--num_validation 1"),
    "validation_prompts": ("watched", "--validation_prompts {folder}/prompts.txt"),
    "guidance_scale": ("watched", "--guidance_scale 3"),
    "judge": ("watched", "--judge {folder}/other/reward"),
    "patience": ("watched", "--patience 1 --judge {folder}/other/reward"),
    "resume_from_checkpoint": ("sft", "--resume {folder}/nowhere"), "seed": ("sft", "--seed 1"),
    "gradient_checkpointing": ("sft", "--gradient_checkpointing"), "parallel": ("sft", "--parallel fsdp"),
    "sequence_parallel": ("sft", "--sequence_parallel 2"), "fsdp_group_size": ("sft", "--fsdp_group_size 2"),
    "offload_activations": ("sft", "--offload_activations"), "keep_attention": ("sft", "--keep_attention"),
    "compile": None,                                                                # tested in tests/scale/
    # tested in tests/test_experts.py
    "expert": None, "lora_2": None, "guidance_scale_2": None,
}, "train_reward": {
    "task": ("reward", "--task i2v"), "model": ("reward", "--model {folder}/other/model"),
    "space": ("reward", "--space rgb"),
    "frames_decoded": ("reward_rgb", "--frames_decoded first"),
    "data": ("reward", "--data {folder}/other/data"),
    # tested in tests/formats/test_labels.py
    "labels": ("reward", "--labels {folder}/nowhere.jsonl"), "bad": None,
    "output_dir": ("reward", "--output_dir {folder}/elsewhere"), "world": ("own", "--world small"),
    "num_samples": ("own", "--num_samples 20"), "samples_dir": ("own", "--samples_dir x"),
    "num_inference_steps": ("own", "--num_inference_steps 3"), "shift": ("own", "--shift 2"),
    "fold": ("reward", "--fold 1/2"),
    "holdout": ("reward", "--holdout 9"), "depth": ("reward", "--depth 1"),
    "pooling": ("reward", "--pooling mean"),
    "loss": ("reward", "--loss bt"), "mismatched": ("reward", "--mismatched 0.9"),
    "fixed_t": ("reward", "--fixed_t 0.1"), "learning_rate": ("reward", "--learning_rate 1e-2"),
    "trunk_learning_rate": ("reward", "--trunk_learning_rate 0"),
    "weight_decay": ("reward", "--weight_decay 9"),
    "max_train_steps": ("reward", "--max_train_steps 1"), "batch_size": ("reward", "--batch_size 4"),
    "max_grad_norm": ("reward", "--max_grad_norm 1e-9"),
    "mixed_precision": ("reward", "--mixed_precision bf16"),
    "checkpointing_steps": ("reward", "--checkpointing_steps 1"),
    "validation_steps": ("reward", "--validation_steps 1"),
    "resume_from_checkpoint": ("reward", "--resume {folder}/nowhere"), "seed": ("reward", "--seed 1"),
    "gradient_checkpointing": ("reward", "--gradient_checkpointing"),
    "parallel": ("reward", "--parallel fsdp"),
    "sequence_parallel": ("reward", "--sequence_parallel 2"),
    "fsdp_group_size": ("reward", "--fsdp_group_size 2"),
    "offload_activations": ("reward", "--offload_activations"),
    "keep_attention": ("reward", "--keep_attention"), "compile": None,             # tested in tests/scale/
}}
FLAGS = [(script, flag) for script, module in (("train_align", train_align), ("train_reward", train_reward))
         for flag in (field.name for field in dataclasses.fields(module.Config))
         if ACTS[script].get(flag, "missing") is not None]
MORE = {"lora": ("sft", "--lora_rank 2"), "watched": ("sft", "--num_validation 2 --validation_steps 2"),
        "world": ("sft", "--data= --num_validation 0"),
        "kept": ("sft", "--checkpointing_steps 1"), "own": ("reward", "--data=")}      # runs beside RUNS


@pytest.fixture(scope="module")
def others(folder):
    """Another model, reward model, LoRA file, set of shards and file of prompts in folder. -> {}, which will
    hold what the runs without the flag left behind."""
    shutil.copytree(folder / "generator", folder / "other/model")
    dit = generator()
    with torch.no_grad():
        dit.blocks[0].ffn[0].weight += 0.1
    model.export_transformer(dit, folder / "other/model/transformer")
    torch.manual_seed(5)
    save_module(PAVRM.from_generator(generator(), 2), folder / "other/reward")
    lora.add(dit, 2)
    lora.save(lora.scaled(dit.state_dict(), 2), folder / "other")
    write_data(folder / "other/data", labels=[1] * 16 + [0] * 16)
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    return {}


@pytest.fixture
def left_behind(folder, others, monkeypatch, capsys):
    """-> left_behind(run, flags): everything that a two-step run leaves behind and calls, or its refusal."""
    calls = {}

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return real(*args, **kwargs)
        monkeypatch.setattr(owner, name, counted)

    def made(*args):
        calls["asked for"] = [str(x) for x in args if isinstance(x, (str, int, float)) or hasattr(x, "parts")]
        return data.Shards(folder / "data")

    count(model.Block, "forward"), count(VideoVAE, "decode")
    monkeypatch.setattr(clips, "clean_clips", made)
    monkeypatch.setattr(clips, "own_samples", made)

    def left_behind(name, flags=""):
        base, more = MORE.get(name, (name, ""))
        for output in (f"base-{name}", "elsewhere"):
            shutil.rmtree(folder / output, ignore_errors=True)
        calls.clear()
        script, argv = command(folder, base, f"base-{name}", "--max_train_steps", "2", *more.split(),
                               *(word.format(folder=folder) for word in flags.split()))
        out = folder / ("elsewhere" if "elsewhere" in flags else f"base-{name}")
        try:
            run(script, argv)
        except SystemExit:
            stderr = capsys.readouterr().err
            assert one_line(stderr) or "error: " in stderr.splitlines()[-1]
            return stderr.splitlines()[-1]
        files = sorted(str(path.relative_to(folder)) for path in out.rglob("*") if ".tmp" not in path.name)
        saved = {}
        if (out / RUNS[base][1]).exists():
            saved = {key: x.sum().item() for key, x in weights(folder, base, out.name).items()}
        return files, saved, metrics(folder, out.name), dict(calls)

    return left_behind


@pytest.mark.parametrize("name", ["sft", "prfl", "reward", "world"])
def test_without_a_flag_the_same_is_left_behind(left_behind, name):
    """So that a difference below is the flag's."""
    assert left_behind(name) == left_behind(name)


@pytest.mark.parametrize("script, flag", FLAGS, ids=[f"{script} --{flag}" for script, flag in FLAGS])
def test_every_flag_does_something(left_behind, others, script, flag):
    name, flags = ACTS[script][flag]
    if name not in others:
        others[name] = left_behind(name)
    assert isinstance(others[name], tuple), others[name]
    found = left_behind(name, flags)
    assert found != others[name]
    if isinstance(found, str):                                  # it asks for what is not there
        named = (f"--{flag}", "--resume_from_checkpoint", "nowhere.jsonl", "text_encoder")
        assert any(word in found for word in named), found


SCRIPTS = {"train_align": (train_align, "Config"), "train_reward": (train_reward, "Config"),
           "sample": (sample, "Config"),
           "evaluate": (evaluate, "Config"), "data check": (data, "Check"), "data encode": (data, "Encode"),
           "label": (label, "Clips"), "label --pairs": (label, "Pairs"), "label report": (label, "Said"),
           "world.clips": (clips, "Config"), "world.pretrain": (pretrain, "Config"),
           "scale.plan": (plan, "Config"),
           "formats.wan": (wan, "Export"), "study.reproduce": (reproduce, "Config"),
           "study.cost": (cost, "Config"),
           "study.node": (node, "Config"), "study.why": (why, "Config"),
           "study.candidates": (candidates, "Config"), "study.samples": (samples, "Config"),
           "study.resampling": (resampling, "Config")}
FIELDS = {(script, field.name): field for script, (module, name) in SCRIPTS.items()
          for field in dataclasses.fields(getattr(module, name))}


def test_the_table_has_every_script():
    have = {Path(module.__file__).resolve() for module, _ in SCRIPTS.values()}
    texts = {path: path.read_text() for path in FILES.values() if path.stem != "common"}
    assert have == {path for path, text in texts.items() if "cli(main, Config" in text
                    or "common.cli(" in text}


def test_the_help_of_a_module_says_how_it_is_started():
    for script, (module, _) in SCRIPTS.items():
        if "." in script:
            assert f'prog="python -m {script}"' in Path(module.__file__).read_text(), script


def given(field, value=None):
    """The words of a command line that give a flag."""
    rule = field.metadata
    if isinstance(field.default, bool) and value is None:
        return [f"--no-{field.name}" if field.default else f"--{field.name}"]
    if value is None and rule["choices"]:
        value = rule["choices"][-1]
    elif value is None:
        value = "0.5" if 1 in (rule["at_most"], rule["below"]) else str(max(2, rule["at_least"] or 0))
    words = [] if rule["positional"] else [f"--{field.name}"]
    return [*words, value, value] if field.name == "pairs" else [*words, value]


def ways(field):
    """Command lines with and without a flag that a rule names."""
    if isinstance(field.default, bool):
        return [], [f"--{field.name}"], [f"--no-{field.name}"]
    without = [] if field.default is dataclasses.MISSING else [[]]
    return *without, *(given(field, value) for value in field.metadata["choices"] or ("0", "2"))


@pytest.mark.parametrize("script, flag", [key for key, field in FIELDS.items() if field.metadata["only"]])
def test_a_flag_is_refused_where_it_does_nothing_and_taken_elsewhere(script, flag):
    """On every combination of what its rule names."""
    Config, field = getattr(*SCRIPTS[script]), FIELDS[script, flag]
    rules = re.split(" or |, ", field.metadata["only"])
    named = {rule.split()[0].lstrip("!") for rule in rules}
    needed = [given(x) for (where, name), x in FIELDS.items()
              if where == script and x.default is dataclasses.MISSING and name not in {flag, *named}]
    said = set()
    for words in itertools.product(*(ways(FIELDS[script, name]) for name in sorted(named - {flag}))):
        try:
            common.parse(Config, "", sum([*words, *needed, given(field)], []))
            said.add("taken")
        except common.InputError as error:
            said.add(str(error))
    assert "taken" in said, said
    assert any(re.match(f"--{flag} means nothing with.*: leave it out", line) for line in said), said


@pytest.mark.parametrize("script, flag", [key for key in FIELDS if key[0] not in ACTS])
def test_every_flag_is_read(script, flag):
    """By its script, or by those that read it for several scripts."""
    source = "".join(Path(module.__file__).read_text() for module in (SCRIPTS[script][0], parts, runs, search,
                                                                      formats_weights))
    assert re.search(rf"config\.{flag}\b|[\"']{flag}[\"']", source)


def test_rules_of_flags():
    """Values, given or not, one of two ways; where it acts it is taken, at its default too."""
    @dataclasses.dataclass
    class Config:
        method: str = common.arg("a", "", choices=("a", "b", "c"))
        data: str | None = common.arg(None, "")
        rank: int = common.arg(0, "")
        only_ab: int = common.arg(1, "", only="method a b")
        fresh: int = common.arg(1, "", only="!data, rank")
        either: int = common.arg(1, "", only="method c, data or !rank 0")

    parse = lambda line: common.parse(Config, "", line.split())
    for line in ("--only_ab 1", "--method b --only_ab 2", "--rank 1 --fresh 1", "--rank 1 --either 2",
                 "--method c --data x --either 2"):
        assert isinstance(parse(line), Config)
    for line, words in (("--method c --only_ab 1", "--only_ab means nothing with --method c: leave it out"),
                        ("--fresh 1",
                         "--fresh means nothing with --rank 0: leave it out, or give --rank too"),
                        ("--rank 1 --data x --fresh 1", "--fresh means nothing with --data x: leave it out"),
                        ("--either 1",
                         "--either means nothing with --method a and with --rank 0: leave it out"),
                        ("--method c --either 1",
                         "--either means nothing without --data and with --rank 0: leave it out, or give "
                         "--data too")):
        with pytest.raises(common.InputError) as refused:
            parse(line)
        assert str(refused.value) == words
