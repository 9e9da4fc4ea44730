"""Wan2.2 A14B through diffusers: a tiny random instance of its very classes, with two experts, for
text-to-video and for image-to-video.
"""
import json

import PIL.Image
import pytest
import torch

import common
import data
import evaluate
import sample
import train_align
import train_reward
from families import of_config
from formats import fingerprint, video
from formats.metadata import read_metadata
from formats.weights import WeightFiles, transformer_folder
from model import load_transformer
from pavrm import load_pavrm

diffusers = pytest.importorskip("diffusers", reason="needs requirements-wan.txt")
pytest.importorskip("transformers", reason="needs requirements-wan.txt")
from tiny_wan import (  # noqa: E402   it imports both
    SHORT,
    Uniform,
    export,
    run,
    sampled,
    write_a14b,
    write_clips,
    write_picture,
)

TASKS = ("t2v", "i2v")
FLAGS = ["--size", "48*32", "--frames", "9", "--fps", "24"]
LATENT = (16, 3, 4, 6)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return write_a14b(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_picture(tmp_path_factory.mktemp("picture") / "first.png", 32, 48)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight films of 48x32 with labels."""
    return write_clips(tmp_path_factory.mktemp("clips"), 48, 32, [9] * 8)


@pytest.fixture(scope="module")
def encoded(clips, pipelines, tmp_path_factory):
    """{task: shards}"""
    out = tmp_path_factory.mktemp("encoded")
    for task in TASKS:
        run(data, clips, "--model", pipelines / task, *FLAGS, command="check")
        run(data, clips, "--out", out / task, "--model", pipelines / task, *FLAGS, command="encode")
    return out


def theirs(pipeline, task, picture, shift, seed, *, change=None, **more):
    """Latents of diffusers' own pipeline from our noise. change: a function of the pipeline."""
    cls = diffusers.WanPipeline if task == "t2v" else diffusers.WanImageToVideoPipeline
    pipe = cls.from_pretrained(pipeline, scheduler=Uniform(shift=shift))
    pipe.set_progress_bar_config(disable=True)
    if change:
        change(pipe)
    given = {"image": PIL.Image.open(picture).convert("RGB")} if task == "i2v" else {}
    noise = common.noise(LATENT, seed, "sample", 0, [0])
    return pipe(prompt="a red circle falls", negative_prompt="blue square", height=32, width=48, num_frames=9,
                num_inference_steps=6, latents=noise, output_type="latent", **given, **more).frames


def prompt_flags(pipeline, task, picture, out, *more):
    image = ["--image", picture] if task == "i2v" else []
    return ["--model", pipeline, "--prompt", "a red circle falls", "--negative_prompt", "blue square", *image,
            *FLAGS, "--num_inference_steps", 6, "--mixed_precision", "no", "--seed", 5, "--output",
            out / "x.mp4", *more]


# ---- sampling
@pytest.mark.parametrize("task, shift", [("t2v", 3.0), ("i2v", 5.0)])
def test_samples_are_the_pipelines_own(pipelines, picture, tmp_path, monkeypatch, task, shift):
    """Noise, shift, the expert of every Euler step, two guidances: the latents of diffusers' pipeline."""
    pipeline = pipelines / task
    flags = ["--shift", shift, "--guidance_scale", 4, "--guidance_scale_2", 3]
    ours = sampled(monkeypatch, *prompt_flags(pipeline, task, picture, tmp_path, *flags))
    wanted = theirs(pipeline, task, picture, shift, 5, guidance_scale=4.0, guidance_scale_2=3.0)
    assert ours.abs().mean() > 0.1
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert video.read_clip(tmp_path / "x.mp4")[0].shape == (9, 32, 48, 3)
    far = (ours - theirs(pipeline, task, picture, shift, 5, guidance_scale=4.0)).abs().max()
    assert far > 1e-3                                           # the second guidance counts

    def swap(pipe):
        pipe.transformer, pipe.transformer_2 = pipe.transformer_2, pipe.transformer

    swapped = theirs(pipeline, task, picture, shift, 5, guidance_scale=4.0, guidance_scale_2=3.0, change=swap)
    assert (ours - swapped).abs().max() > 1e-2                  # and so does each expert
    one = sampled(monkeypatch, *prompt_flags(pipeline, task, picture, tmp_path, "--shift", shift,
                                                "--guidance_scale", 4))
    torch.testing.assert_close(one, theirs(pipeline, task, picture, shift, 5, guidance_scale=4.0), rtol=1e-4,
                               atol=1e-4)                       # given alone, it is both, as in diffusers


def test_what_is_not_said_is_its_own(pipelines):
    """Published size, frames, rate, steps, guidances and shift."""
    for task, guidances, shift in (("t2v", (4, 3), 12), ("i2v", (3.5, 3.5), 5)):
        config, dit_config = sample.Config("a red circle"), transformer_folder(pipelines / task)[1]
        assert of_config(dit_config).name.startswith("Wan2.2 A14B")
        assert sample.settle(config, dit_config) == (832, 480)
        assert (config.frames, config.fps, config.num_inference_steps, config.shift) == (81, 16, 40, shift)
        assert (config.guidance_scale, config.guidance_scale_2) == guidances
        assert config.negative_prompt.startswith("色调艳丽")


def test_a_row_of_a_folder_makes_its_video_again(pipelines, tmp_path):
    """The second guidance is recorded."""
    (tmp_path / "p.txt").write_text("a red circle\n")
    run(sample, "--model", pipelines / "t2v", "--prompts", tmp_path / "p.txt", *FLAGS, "--mixed_precision",
        "no", "--num_inference_steps", 2, "--guidance_scale_2", 2.5, "--output_dir", tmp_path / "a")
    settings = json.loads((tmp_path / "a/metadata.jsonl").read_text())["settings"]
    assert (settings["guidance_scale"], settings["guidance_scale_2"]) == (4, 2.5)
    run(sample, "--prompts", tmp_path / "a/metadata.jsonl", "--output_dir", tmp_path / "b")
    a, b = ((tmp_path / name / "000000.mp4").read_bytes() for name in "ab")
    assert a == b and len(read_metadata(tmp_path / "b")) == 1
    run(sample, "--prompts", tmp_path / "a/metadata.jsonl", "--guidance_scale", 5, "--output_dir",
        tmp_path / "c")
    settings = json.loads((tmp_path / "c/metadata.jsonl").read_text())["settings"]
    assert (settings["guidance_scale"], settings["guidance_scale_2"]) == (5, 5)         # it follows the first


# ---- from a folder of clips to diffusers
@pytest.fixture(scope="module")
def rewards(pipelines, encoded, tmp_path_factory):
    """{task: reward model}"""
    out = tmp_path_factory.mktemp("rewards")
    for task in TASKS:
        run(train_reward, "--model", pipelines / task, "--data", encoded / task, *SHORT, "--output_dir",
            out / task, "--holdout", 4, "--depth", 1)
    return {task: out / task / "reward" for task in TASKS}


def align(pipelines, encoded, rewards, task, out, *more):
    run(train_align, "--model", pipelines / task, "--data", encoded / task, "--reward", rewards[task], *SHORT,
        "--learning_rate", "1e-2", "--num_inference_steps", 4, "--output_dir", out, *more)


def state(folder):
    """{name: weight} of both experts"""
    return load_transformer(folder).state_dict()


def differing(a, b):
    """The experts in which two states differ."""
    return {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("task", TASKS)
def test_the_trunk_is_the_low_noise_experts(pipelines, rewards, task):
    low, pavrm = load_transformer(pipelines / task).low, load_pavrm(rewards[task])
    trunk, whole = pavrm.trunk.state_dict(), low.state_dict()
    frozen = [name for name in trunk if "embedding" in name]
    assert frozen and all(torch.equal(trunk[name], whole[name]) for name in frozen)
    assert load_pavrm(rewards[task], load_transformer(pipelines / task, load_now=False))    # fits both


@pytest.mark.parametrize("task", TASKS)
def test_clips_to_an_aligned_expert_in_diffusers(pipelines, encoded, rewards, picture, tmp_path, monkeypatch,
                                                 task):
    """Alignment with validation, comparison, export: then diffusers' pipeline makes the video that
    sample.py --transformer makes."""
    pipeline, run_folder = pipelines / task, tmp_path / "prfl"
    align(pipelines, encoded, rewards, task, run_folder, "--num_validation", 1)
    found = json.loads((run_folder / "args.json").read_text())
    shift, scale, scale_2 = {"t2v": (12, 4, 3), "i2v": (5, 3.5, 3.5)}[task]
    assert (found["expert"], found["shift"], found["guidance_scale"], found["guidance_scale_2"]) == (
        "low", shift, scale, scale_2)
    assert not (run_folder / "transformer").exists() and (run_folder / "transformer_2").is_dir()
    assert not list(run_folder.glob("checkpoint-*/transformer")) and list(run_folder.glob(
        "checkpoint-*/transformer_2"))
    assert differing(state(pipeline), state(run_folder)) == {"low"}
    for same in (run_folder / "transformer_2", run_folder / "checkpoint-000002"):
        assert not differing(state(same), state(run_folder))
    assert fingerprint.of_weights(run_folder) not in (None, fingerprint.of_weights(pipeline))

    image = {"image": str(picture)} if task == "i2v" else {}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red circle"} | image) + "\n")
    run(evaluate, "--model", pipeline, "--prompts", tmp_path / "p.jsonl", f"base={pipeline}",
        f"prfl={run_folder}", "--reward", rewards[task], *FLAGS, "--num_inference_steps", 2, "--output_dir",
        tmp_path / "out")
    assert video.read_clip(tmp_path / "out/prfl/000000.mp4")[0].shape == (9, 32, 48, 3)
    settings = json.loads((tmp_path / "out/prfl/metadata.jsonl").read_text())["settings"]
    assert (settings["guidance_scale"], settings["guidance_scale_2"]) == (scale, scale_2)

    export(str(run_folder), out=str(tmp_path / "aligned"), dtype="fp32")
    assert [path.name for path in (tmp_path / "aligned").iterdir()] == ["transformer_2"]
    assert not differing(state(tmp_path / "aligned"), state(run_folder))

    def put(pipe):
        folder = tmp_path / "aligned/transformer_2"
        pipe.transformer_2 = diffusers.WanTransformer3DModel.from_pretrained(folder)

    flags, how = ["--transformer", run_folder], dict(guidance_scale=scale, guidance_scale_2=scale_2)
    ours = sampled(monkeypatch, *prompt_flags(pipeline, task, picture, tmp_path, *flags))
    wanted = theirs(pipeline, task, picture, shift, 5, change=put, **how)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert (ours - theirs(pipeline, task, picture, shift, 5, **how)).abs().max() > 1e-3     # it was trained


@pytest.mark.parametrize("expert", ["high", "both"])
def test_the_other_choices_of_an_expert(pipelines, encoded, rewards, tmp_path, monkeypatch, expert):
    align(pipelines, encoded, rewards, "t2v", tmp_path / "run", "--expert", expert, "--num_validation", 0,
          "--max_train_steps", 6)
    written = {path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("transformer")}
    trained = {"high": {"high"}, "both": {"high", "low"}}[expert]
    assert written == {{"high": "transformer", "low": "transformer_2"}[name] for name in trained}
    assert differing(state(pipelines / "t2v"), state(tmp_path / "run")) == trained
    read, tensor = set(), WeightFiles.tensor
    with monkeypatch.context() as patch:
        patch.setattr(WeightFiles, "tensor",
                      lambda files, name: read.add(files.path.resolve().parent) or tensor(files, name))
        export(str(tmp_path / "run"), out=str(tmp_path / "official"), layout="wan", dtype="fp32")
    assert read == {(tmp_path / "run").resolve()}               # nothing of an expert that did not train
    written = {path.name for path in (tmp_path / "official").iterdir()}
    assert written == {f"{name}_noise_model" for name in trained}
    assert not differing(state(tmp_path / "official"), state(tmp_path / "run"))


def test_adapters_of_both_experts_in_diffusers(pipelines, encoded, rewards, picture, tmp_path, monkeypatch):
    """Two files, one for each expert, make in diffusers the video that they make in sample.py."""
    pytest.importorskip("peft", reason="needs requirements-test.txt")
    pipeline, files = pipelines / "t2v", [tmp_path / f"run/pytorch_lora_weights{end}.safetensors"
                                          for end in ("", "_2")]
    align(pipelines, encoded, rewards, "t2v", tmp_path / "run", "--expert", "both", "--lora_rank", 2,
          "--export", "lora", "--num_validation", 0, "--max_train_steps", 6)
    assert not list((tmp_path / "run").glob("transformer*")) and all(file.is_file() for file in files)

    def load(pipe):
        pipe.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="high")
        pipe.load_lora_weights(files[1].parent, weight_name=files[1].name, adapter_name="low",
                               load_into_transformer_2=True)

    how = dict(guidance_scale=4.0, guidance_scale_2=3.0)
    ours = sampled(monkeypatch, *prompt_flags(pipeline, "t2v", picture, tmp_path, "--lora", files[0],
                                                 "--lora_2", files[1]))
    wanted = theirs(pipeline, "t2v", picture, 12.0, 5, change=load, **how)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert (ours - theirs(pipeline, "t2v", picture, 12.0, 5, **how)).abs().max() > 1e-3
    align(pipelines, encoded, rewards, "t2v", tmp_path / "more", "--lora_2", files[1], "--num_validation", 0)
    assert [path.name for path in sorted((tmp_path / "more").glob("*lora*"))] == [files[1].name]
