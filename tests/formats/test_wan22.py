"""Wan2.2 TI2V-5B through diffusers: a tiny random instance of its very classes, for text-to-video and, with a
first latent frame that is given clean, for image-to-video.
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
from common import InputError
from families import load_vae, of_config
from formats import encoders, video
from formats.metadata import read_metadata
from formats.weights import SHIPPED, TI2V_CHANNELS, transformer_folder
from model import image_inputs, load_transformer

diffusers = pytest.importorskip("diffusers", reason="needs requirements-wan.txt")
pytest.importorskip("transformers", reason="needs requirements-wan.txt")
from tiny_wan import (  # noqa: E402   it imports both
    SHORT,
    Uniform,
    export,
    run,
    write_clips,
    write_picture,
    write_ti2v,
)

FLAGS = ["--size", "96*64", "--frames", "9", "--fps", "24"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_ti2v(tmp_path_factory.mktemp("wan")) / "ti2v"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight films of 96x64 with labels."""
    return write_clips(tmp_path_factory.mktemp("clips"), 96, 64, [9] * 8)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return write_picture(tmp_path_factory.mktemp("picture") / "first.png", 64, 96)


@pytest.fixture(scope="module")
def encoded(clips, pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "data"
    run(data, clips, "--out", out, "--model", pipeline, *FLAGS, command="encode")
    return out


def refused(capsys, module, *argv, command=None):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(module, *argv, command=command)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


# ---- sampling
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_samples_are_the_pipelines_own(pipeline, picture, tmp_path, monkeypatch, task):
    """Noise, shift, guidance, the first frame, every Euler step: the latents of diffusers' pipeline."""
    found, decode = [], encoders.decode_pixels
    monkeypatch.setattr(encoders, "decode_pixels", lambda vae, x: found.append(x.clone()) or decode(vae, x))
    image = ["--task", "i2v", "--image", picture] if task == "i2v" else []
    run(sample, "--model", pipeline, "--prompt", "a red circle falls", "--negative_prompt", "blue square",
        *image, *FLAGS, "--num_inference_steps", 4, "--guidance_scale", 3.5, "--num_videos", 2,
        "--mixed_precision", "no", "--seed", 5, "--output", tmp_path / "x.mp4")
    ours = torch.cat(found)
    cls = diffusers.WanPipeline if task == "t2v" else diffusers.WanImageToVideoPipeline
    theirs = cls.from_pretrained(pipeline, scheduler=Uniform(shift=5.0))
    theirs.set_progress_bar_config(disable=True)
    given = {"image": PIL.Image.open(picture).convert("RGB")} if task == "i2v" else {}
    for k in range(2):
        latents = theirs(prompt="a red circle falls", negative_prompt="blue square", height=64, width=96,
                         num_frames=9, num_inference_steps=4, guidance_scale=3.5,
                         latents=common.noise((48, 3, 4, 6), 5, "sample", 0, [k]), output_type="latent",
                         **given).frames
        assert ours[k].abs().mean() > 0.1
        torch.testing.assert_close(ours[k:k + 1], latents, rtol=1e-4, atol=1e-4)
        assert video.read_clip(tmp_path / f"x-{k}.mp4")[0].shape == (9, 64, 96, 3)
    if task == "i2v":
        vae = load_vae(pipeline / "vae")
        with torch.no_grad():
            first = vae.encode(video.from_pixels(video.read_clip(picture)[0][None]))
        assert torch.equal(ours[:, :, :1], first.expand(2, -1, -1, -1, -1))  # to the bit: no step moved it


def test_a_row_of_a_folder_makes_its_video_again(pipeline, picture, tmp_path):
    """The task is recorded, as the model's folder does not say it."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red circle", "image": str(picture)}) + "\n")
    more = ["--num_inference_steps", 2, "--mixed_precision", "no"]
    run(sample, "--model", pipeline, "--task", "i2v", "--prompts", tmp_path / "p.jsonl", *FLAGS, *more,
        "--output_dir", tmp_path / "a")
    assert json.loads((tmp_path / "a/metadata.jsonl").read_text())["settings"]["task"] == "i2v"
    run(sample, "--prompts", tmp_path / "a/metadata.jsonl", "--output_dir", tmp_path / "b")
    a, b = ((tmp_path / name / "000000.mp4").read_bytes() for name in "ab")
    assert a == b and len(read_metadata(tmp_path / "b")) == 1


def test_what_is_not_said_is_its_own(pipeline):
    """Published size, frames, rate, steps, guidance and shift, in both orientations."""
    for task in ("t2v", "i2v"):
        config = sample.Config("a red circle")
        assert sample.settle(config, transformer_folder(pipeline, task)[1]) == (1280, 704)
        assert (config.frames, config.fps, config.num_inference_steps, config.guidance_scale,
                config.shift) == (121, 24, 50, 5, 5)
        assert config.negative_prompt.startswith("色调艳丽")
    config = sample.Config("a red circle", size="704*1280")
    sample.settle(config, transformer_folder(pipeline)[1])
    assert config.shift == 5


# ---- from a folder of clips to diffusers
def test_latents_are_diffusers_own_normalised(pipeline, clips, encoded):
    theirs = diffusers.AutoencoderKLWan.from_pretrained(pipeline / "vae")
    mean, std = (torch.tensor(theirs.config[f"latents_{name}"]).view(1, 48, 1, 1, 1)
                 for name in ("mean", "std"))
    shards = data.Shards(encoded)
    assert len(shards) == 8 and shards.shapes == {"latents": (48, 3, 4, 6), "context": (512, 20)}
    x = video.from_pixels(video.read_clip(clips / "3.mp4")[0][None])
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mode()
        latents = shards.batch([3])["latents"]
        torch.testing.assert_close(latents, (z - mean) / std, rtol=1e-4, atol=1e-4)
        ours = load_vae(pipeline / "vae")
        torch.testing.assert_close(ours.decode(latents), theirs.decode(z).sample, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(latents[:, :, :1], ours.encode(x[:, :, :1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_clips_to_an_aligned_transformer_in_diffusers(pipeline, encoded, picture, tmp_path, task):
    """Reward, alignment with validation, comparison, export: then diffusers' transformer with a time for each
    token has our velocity."""
    flags = ["--model", pipeline, "--task", task, "--data", encoded, *SHORT]
    run(train_reward, *flags, "--output_dir", tmp_path / "reward", "--holdout", 4, "--depth", 1)
    reward = tmp_path / "reward/reward"
    run(train_align, *flags, "--output_dir", tmp_path / "prfl", "--reward", reward, "--learning_rate", "1e-2",
        "--num_inference_steps", 3, "--num_validation", 1)
    found = json.loads((tmp_path / "prfl/args.json").read_text())
    assert (found["shift"], found["guidance_scale"], found["task"]) == (5, 5, task)
    run(train_align, *flags, "--output_dir", tmp_path / "lora", "--reward", reward, "--lora_rank", 2,
        "--num_inference_steps", 2, "--num_validation", 0, "--export", "lora")
    assert (tmp_path / "lora/pytorch_lora_weights.safetensors").is_file()
    image = {"image": str(picture)} if task == "i2v" else {}
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red circle"} | image) + "\n")
    run(evaluate, "--model", pipeline, "--task", task, "--prompts", tmp_path / "p.jsonl", f"base={pipeline}",
        f"prfl={tmp_path / 'prfl'}", "--reward", reward, *FLAGS, "--num_inference_steps", 2,
        "--output_dir", tmp_path / "out")
    assert video.read_clip(tmp_path / "out/prfl/000000.mp4")[0].shape == (9, 64, 96, 3)

    export(str(tmp_path / "prfl/transformer"), out=str(tmp_path / "aligned"), dtype="fp32")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "aligned")
    ours, base = load_transformer(tmp_path / "prfl"), load_transformer(pipeline, task=task)
    assert ours.config == base.config and ours.config["model_type"] == task
    batch, t = data.Shards(encoded).batch([0]), torch.tensor([0.6])
    x = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    given = image_inputs(ours.config, batch, "cpu")
    times = 1000 * t.expand(1, 18).clone()
    if task == "i2v":
        x[:, :, :1] = batch["latents"][:, :, :1]
        times[:, :6] = 0                                        # 2 x 3 tokens of the first latent frame
    with torch.no_grad():
        velocity = ours(x, t, batch["context"], **given)
        wanted = theirs(x, times, batch["context"])[0]
        assert (velocity - base(x, t, batch["context"], **given)).abs().max() > 1e-2          # it was trained
    if task == "i2v":
        assert not velocity[:, :, 0].any() and wanted[:, :, 0].any()
        velocity, wanted = velocity[:, :, 1:], wanted[:, :, 1:]
    assert (velocity - wanted).norm() < 1e-4 * wanted.norm()


def test_the_authors_own_layout(pipeline, tmp_path):
    export(str(pipeline), out=str(tmp_path / "official"), layout="wan", dtype="fp32")
    assert json.loads((tmp_path / "official/config.json").read_text())["model_type"] == "ti2v"
    for task in (None, "t2v", "i2v"):
        ours, again = (load_transformer(folder, task=task) for folder in (pipeline, tmp_path / "official"))
        assert ours.config == again.config and ours.config["model_type"] == (task or "t2v")
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), again.parameters(), strict=True))
        row = of_config(ours.config)
        assert (row.channels, row.pinned) == (TI2V_CHANNELS, task == "i2v")


# ---- refusals
def test_what_does_not_fit_is_one_line(pipeline, clips, encoded, picture, tmp_path, capsys):
    small = ["--size", "48*32", "--frames", "9", "--fps", "24"]
    line = refused(capsys, data, clips, "--out", tmp_path / "x", "--model", pipeline, *small,
                   command="encode")
    assert "both multiples of 32, got 48*32" in line
    line = refused(capsys, data, clips, "--out", tmp_path / "x", "--vae", pipeline / "vae", *small,
                   command="encode")
    assert "both multiples of 32, got 48*32" in line
    assert "multiples of 32" in refused(capsys, data, clips, "--model", pipeline, *small, command="check")
    line = refused(capsys, data, clips, "--model", pipeline, "--size", "96,64", command="check")
    assert "--size must be W*H, such as 832*480, got 96,64" in line
    prompt = ["--model", pipeline, "--prompt", "a", "--output", tmp_path / "x.mp4"]
    assert "multiples of 32" in refused(capsys, sample, *prompt, *small)
    line = refused(capsys, sample, *prompt, *FLAGS, "--image", picture)
    assert "this one is t2v, or i2v with --task i2v" in line
    assert "--image is needed" in refused(capsys, sample, *prompt, *FLAGS, "--task", "i2v")
    line = refused(capsys, sample, *prompt, *FLAGS, "--transformer", SHIPPED["t2v"])
    assert f"--transformer {SHIPPED['t2v']}: takes 16 channels of latents, and" in line
    (tmp_path / "p.txt").write_text("a red circle\n")
    line = refused(capsys, evaluate, "--model", pipeline, "--prompts", tmp_path / "p.txt", pipeline,
                   f"other={SHIPPED['t2v']}", *FLAGS, "--output_dir", tmp_path / "out")
    assert f"{SHIPPED['t2v']}: takes 16 channels of latents, and {pipeline}/vae gives 48: give" in line
    (tmp_path / "p.txt").unlink()
    line = refused(capsys, train_align, "--model", pipeline, "--task", "i2v", "--data", encoded, "--method",
                   "refl", "--output_dir", tmp_path / "run", "--reward", tmp_path, *SHORT)
    assert "--frames_decoded all" in line
    with pytest.raises(InputError, match="latents have 48 channels, the model has 16"):
        data.Shards(encoded).require(16)
    assert not list(tmp_path.iterdir())
