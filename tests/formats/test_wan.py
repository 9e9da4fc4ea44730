"""Wan2.1's own encoders through diffusers and transformers: tiny random instances of the very classes, saved
to disk as a pipeline folder is, and the whole way from a folder of clips to a transformer that diffusers'
pipelines run.
"""
import json
import shutil
import sys

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import common
import data
import evaluate
import families
import sample
import train_align
import train_reward
from common import InputError
from families import load_text_encoder, load_vae
from formats import encoders, video, wan
from formats.weights import WEIGHTS, save_module
from model import image_inputs, load_transformer
from pavrm import PAVRM

diffusers = pytest.importorskip("diffusers", reason="needs requirements-wan.txt")
pytest.importorskip("transformers", reason="needs requirements-wan.txt")
from tiny_wan import (  # noqa: E402   it imports both
    SHORT,
    WORDS,
    Uniform,
    export,
    run,
    sampled,
    write_clips,
    write_pipelines,
)

FLAGS = ["--size", "48*32", "--frames", "9", "--fps", "16"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return write_pipelines(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Eight films of 64x48 at 24 per second and one too short, with labels."""
    return write_clips(tmp_path_factory.mktemp("clips"), 64, 48, [16] * 8 + [6])


def encode(clips, out, pipeline, *more):
    run(data, clips, "--out", out, "--vae", pipeline / "vae", "--text_encoder", pipeline / "text_encoder",
        *FLAGS,
        *more, command="encode")
    return data.Shards(out)


def pictures(clips, i):
    # [1, 3, 9, 32, 48]
    return video.from_pixels(video.read_clip(clips / f"{i}.mp4", (48, 32), 9, 16)[0][None])


# ---- the encoders
def test_latents_are_diffusers_own_normalised(pipelines):
    theirs = diffusers.AutoencoderKLWan.from_pretrained(pipelines / "t2v/vae")
    x = torch.rand(2, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, 16, 1, 1, 1) for values in (theirs.config.latents_mean,
                                                                         theirs.config.latents_std))
    ours = load_vae(pipelines / "t2v/vae")
    with torch.no_grad():
        z = theirs.encode(x).latent_dist.mode()
        latents = ours.encode(x)
        assert latents.shape == (2, 16, 3, 4, 6) and mean[0, 0].item() == pytest.approx(-0.7571)
        torch.testing.assert_close(latents, (z - mean) / std, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.decode(latents), theirs.decode(z).sample, rtol=1e-4, atol=1e-4)
        alone = ours.encode(x[:, :, :1])                            # causal: what image-to-video relies on
        torch.testing.assert_close(latents[:, :, :1], alone, rtol=1e-4, atol=1e-5)


def test_context_is_the_pipelines_own(pipelines):
    pipeline = diffusers.WanPipeline.from_pretrained(pipelines / "t2v")
    prompts = ["a red circle", "", "  the  blue square &amp; a circle\n falls ", " ".join(WORDS * 60)]
    wanted, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=512)
    context = load_text_encoder(pipelines / "t2v/text_encoder").encode(prompts)
    assert context.shape == (4, 512, 20) and context.dtype == torch.float32
    assert [int(row.abs().sum(-1).count_nonzero()) for row in context] == [4, 1, 8, 512]
    torch.testing.assert_close(context, wanted, rtol=1e-4, atol=2e-5)


def test_image_tokens_are_the_pipelines_own(pipelines):
    pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(pipelines / "i2v")
    images = torch.randint(0, 256, (2, 32, 48, 3), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    tokens = wan.WanImageEncoder(pipelines / "i2v/image_encoder").encode(images)
    assert tokens.shape == (2, 5, 24)
    wanted = torch.cat([pipeline.encode_image(image.numpy(), "cpu") for image in images])
    torch.testing.assert_close(tokens, wanted)


def test_the_condition_is_the_pipelines_own(pipelines, clips, tmp_path):
    """y of image-to-video equals the mask and latents that diffusers' pipeline makes of the first frame."""
    shards = encode(clips, tmp_path, pipelines / "i2v", "--image_encoder", pipelines / "i2v/image_encoder")
    assert shards.shapes["clip_fea"] == (5, 24) and shards.shapes["condition"] == (16, 3, 4, 6)
    pipeline = diffusers.WanImageToVideoPipeline.from_pretrained(pipelines / "i2v")
    config = load_transformer(pipelines / "i2v").config
    given = image_inputs(config, shards.batch([0, 5]), "cpu")
    for row, i in enumerate((0, 5)):
        first = pictures(clips, i)[:, :, 0]                                                # [1, 3, H, W]
        _, y = pipeline.prepare_latents(first, 1, 16, 32, 48, 9, torch.float32, torch.device("cpu"))
        torch.testing.assert_close(given["y"][row:row + 1], y, rtol=1e-4, atol=1e-5)
        frame = video.read_clip(clips / f"{i}.mp4", (48, 32), 9, 16)[0][0]
        torch.testing.assert_close(given["clip_tokens"][row:row + 1],
                                   pipeline.encode_image(frame.numpy(), "cpu"))


# ---- from a folder of clips to diffusers
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_clips_to_an_aligned_transformer_in_diffusers(pipelines, clips, tmp_path, kind):
    pipeline = pipelines / kind
    more = ["--image_encoder", pipeline / "image_encoder"] if kind == "i2v" else []
    shards = encode(clips, tmp_path / "data", pipeline, *more)
    assert len(shards) == 8 and shards.latent_shape == (16, 3, 4, 6) and shards.context_shape == (512, 20)
    assert "too short" in (tmp_path / "data/report.jsonl").read_text()
    vae, text = load_vae(pipeline / "vae"), load_text_encoder(pipeline / "text_encoder")
    with torch.no_grad():
        torch.testing.assert_close(shards.batch([3])["latents"], vae.encode(pictures(clips, 3)), rtol=1e-4,
                                   atol=1e-4)
        torch.testing.assert_close(shards.batch([3])["context"], text.encode([shards.rows[3]["prompt"]]))

    common_flags = ["--model", pipeline, "--data", tmp_path / "data", *SHORT]
    run(train_reward, *common_flags, "--output_dir", tmp_path / "reward", "--holdout", 4, "--depth", 1)
    for method, more in (("prfl", ()), ("rwr", ("--num_samples", 4))):
        run(train_align, *common_flags, "--output_dir", tmp_path / method, "--method", method, "--reward",
            tmp_path / "reward/reward", "--learning_rate", "1e-2", "--num_inference_steps", 2, *more)
    export(str(tmp_path / "prfl/transformer"), out=str(tmp_path / "aligned"), dtype="fp32")

    transformer = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "aligned")
    ours, base = load_transformer(tmp_path / "prfl"), load_transformer(pipeline)
    g = torch.Generator().manual_seed(0)
    batch, t = shards.batch([0]), torch.tensor([0.6])
    x = torch.randn(1, 16, 3, 4, 6, generator=g)
    image = image_inputs(ours.config, batch, "cpu")
    with torch.no_grad():
        velocity = ours(x, t, batch["context"], **image)
        theirs = transformer(torch.cat([x, image["y"]], 1) if image else x, 1000 * t, batch["context"],
                             encoder_hidden_states_image=image.get("clip_tokens"))[0]
        assert (velocity - base(x, t, batch["context"], **image)).abs().max() > 1e-2          # it was trained
    assert (velocity - theirs).norm() < 1e-4 * theirs.norm()

    cls = diffusers.WanPipeline if kind == "t2v" else diffusers.WanImageToVideoPipeline
    whole = cls.from_pretrained(pipeline, transformer=transformer)
    given = {"image": torch.rand(1, 3, 32, 48, generator=g)} if kind == "i2v" else {}
    made = whole(prompt_embeds=batch["context"], height=32, width=48, num_frames=9, num_inference_steps=1,
                 output_type="pt",
                 guidance_scale=1.0, generator=g, **given).frames
    assert made.shape == (1, 9, 3, 32, 48) and made.isfinite().all()


def test_shards_without_image_tokens_are_refused(pipelines, clips, tmp_path):
    """An image-to-video model with image tokens refuses shards without them, in one line that names the
    flag."""
    encode(clips, tmp_path / "data", pipelines / "i2v")
    for module, more in ((train_reward, ["--holdout", 4]), (train_align, ["--method", "sft"])):
        with pytest.raises(SystemExit) as end:
            run(module, "--model", pipelines / "i2v", "--data", tmp_path / "data", "--output_dir",
                tmp_path / "run",
                *SHORT, *more)
        assert end.value.code == 2 and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="image tokens of width 24, .*: encode with --image_encoder"):
        data.Shards(tmp_path / "data").require(image_dim=24)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_model_brings_its_encoders_and_refuses_shards_of_others(pipelines, clips, tmp_path, kind):
    """`encode --model` is `encode` with each encoder named; another encoder, or task, than at encoding is
    refused."""
    pipeline, image = pipelines / kind, ["--image_encoder", pipelines / "i2v/image_encoder"] * (kind == "i2v")
    run(data, clips, "--out", tmp_path / "model", "--model", pipeline, *FLAGS, command="encode")
    by_name, shards = encode(clips, tmp_path / "named", pipeline, *image), data.Shards(tmp_path / "model")
    a, b = shards.batch(range(8)), by_name.batch(range(8))
    assert a.keys() == b.keys() and ("condition" in a, "clip_fea" in a) == (kind == "i2v",) * 2
    assert all(torch.equal(a[name], b[name])
               for name in shards.shapes) and shards.settings == by_name.settings

    dit = load_transformer(pipeline)
    data.require_fit(shards, dit, pipeline)
    for role in encoders.find_encoders(pipeline):
        other = shutil.copytree(pipeline, tmp_path / role)
        path = next((other / role).glob("*.safetensors"))
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        save_file(tensors | {name: tensors[name] + 1}, path, {"format": "pt"})
        with pytest.raises(InputError, match=f"was encoded with another {role} than .*: encode with --model"):
            data.require_fit(shards, dit, other)
        with pytest.raises(SystemExit):
            run(train_reward, "--model", other, "--data", tmp_path / "model", "--output_dir",
                tmp_path / "run", "--holdout", 4,
                *SHORT)
    assert not (tmp_path / "run").exists()
    if kind == "t2v":  # as of a Wan2.2 model: first frame, and no image tokens
        config = load_transformer(pipelines / "i2v").config
        with pytest.raises(InputError, match="i2v .* without CLIP tokens is of a family that is not "
                                             "supported"):
            data.require_fit(shards, type("Dit", (), {"config": config | {"image_dim": None}}), pipeline)
        shards.require = lambda *_: None  # it has tokens, and lacks the first frame alone
        with pytest.raises(InputError, match="lacks the given first frame as Wan2.1's .* take it: encode "
                                             "with --model"):
            data.require_fit(shards, type("Dit", (), {"config": config}), pipeline)


@pytest.mark.parametrize("module", [train_reward, train_align])
def test_without_data_there_is_one_line(pipelines, tmp_path, capsys, module):
    """The embedded world is no world for Wan."""
    reward = ["--method", "sft"] if module is train_align else []
    with pytest.raises(SystemExit) as end:
        run(module, "--model", pipelines / "t2v", "--output_dir", tmp_path / "run", *SHORT, *reward)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and "--data" in lines[0] and not (tmp_path
                                                                                     / "run").exists()


# ---- refusals
def refused(capsys, clips, tmp_path, *flags):
    with pytest.raises(SystemExit) as end:
        run(data, clips, "--out", tmp_path / "refused", *FLAGS, *flags, command="encode")
    line = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert end.value.code == 2 and len(line) == 1 and not (tmp_path / "refused").exists()
    return line[0]


def test_broken_folders_are_one_line(pipelines, clips, tmp_path, capsys):
    from safetensors.torch import load_file, save_file
    vae = shutil.copytree(pipelines / "t2v/vae", tmp_path / "vae")
    file = vae / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    lacking = {name: x for name, x in weights.items() if name != "quant_conv.bias"}
    for broken in (lacking, weights | {"quant_conv.bias": torch.zeros(3)},
                   weights | {"other": torch.zeros(3)}):
        save_file(broken, file, {"format": "pt"})
        line = refused(capsys, clips, tmp_path, "--vae", vae)
        assert str(vae) in line and "AutoencoderKLWan" in line
    file.write_bytes(file.read_bytes()[:1000])
    assert str(vae) in refused(capsys, clips, tmp_path, "--vae", vae)
    file.unlink()
    assert str(vae) in refused(capsys, clips, tmp_path, "--vae", vae)

    text = shutil.copytree(pipelines / "t2v/text_encoder", tmp_path / "text/text_encoder")
    assert "no tokenizer in it" in refused(capsys, clips, tmp_path, "--text_encoder", text)
    tokens = shutil.copytree(pipelines / "t2v/tokenizer", tmp_path / "text/tokenizer")
    file = text / "model.safetensors"
    weights = load_file(file)
    save_file({n: x for n, x in weights.items() if "block.1" not in n}, file, {"format": "pt"})
    line = refused(capsys, clips, tmp_path, "--text_encoder", text)
    assert "missing" in line and "encoder.block.1" in line and str(text) in line
    save_file(weights, file, {"format": "pt"})
    for name in tokens.glob("tokenizer.json"):
        name.write_text("{")
    assert f"{tokens}: not a whole tokenizer" in refused(capsys, clips, tmp_path, "--text_encoder", text)
    for file in (tokens / "tokenizer.json", vae / WEIGHTS):
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
        where = ["--vae", vae] if vae in file.parents else ["--text_encoder", text]
        assert f"{file}: is a pointer of git-lfs" in refused(capsys, clips, tmp_path, *where)
    assert "nowhere" in refused(capsys, clips, tmp_path, "--image_encoder", tmp_path / "nowhere")


def test_without_the_extra_there_is_one_line(pipelines, clips, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if not installed
    for flag, name in (("--vae", "vae"), ("--text_encoder", "text_encoder")):
        line = refused(capsys, clips, tmp_path, flag, pipelines / "t2v" / name)
        assert line.endswith("needs diffusers: pip install -r requirements-wan.txt")
    run(data, clips, "--out", tmp_path / "core", *FLAGS, command="encode")  # the shipped models need none
    assert len(data.Shards(tmp_path / "core")) == 8


def test_export_never_replaces_a_folder(pipelines, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        export(str(pipelines / "t2v"), out=str(pipelines / "t2v"))
    export(str(pipelines / "t2v"), out=str(tmp_path / "official"), layout="wan", dtype="fp32")
    a, b = (load_transformer(folder).state_dict() for folder in (pipelines / "t2v", tmp_path / "official"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- sample.py
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_samples_are_the_pipelines_own(pipelines, tmp_path, monkeypatch, kind):
    """Noise, shift, guidance against the negative prompt, first frame, every Euler step: the latents of
    diffusers' pipeline."""
    g = torch.Generator().manual_seed(3)
    picture = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=g)
    video.write_png(tmp_path / "first.png", picture)
    image = ["--image", tmp_path / "first.png"] if kind == "i2v" else []
    ours = sampled(monkeypatch, "--model", pipelines / kind, "--prompt", "a red circle falls",
                   "--negative_prompt", "blue square",
                   *image, *FLAGS, "--num_inference_steps", 4, "--guidance_scale", 3.5, "--shift", 3,
                   "--num_videos", 2,
                   "--mixed_precision", "no", "--seed", 5, "--output", tmp_path / "x.mp4")
    cls = diffusers.WanPipeline if kind == "t2v" else diffusers.WanImageToVideoPipeline
    pipeline = cls.from_pretrained(pipelines / kind, scheduler=Uniform(shift=3.0))
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": PIL.Image.fromarray(picture.numpy())} if kind == "i2v" else {}
    for k in range(2):
        theirs = pipeline(prompt="a red circle falls", negative_prompt="blue square", height=32, width=48,
                          num_frames=9,
                          num_inference_steps=4, guidance_scale=3.5,
                          latents=common.noise((16, 3, 4, 6), 5, "sample", 0, [k]),
                          output_type="latent", **given).frames
        assert ours[k].abs().mean() > 0.1
        torch.testing.assert_close(ours[k:k + 1], theirs, rtol=1e-4, atol=1e-4)
        assert video.read_clip(tmp_path / f"x-{k}.mp4")[0].shape == (9, 32, 48, 3)
        assert video.read_clip(tmp_path / f"x-{k}.mp4")[1] == 16


def test_shards_carry_the_null_contexts(pipelines, clips, tmp_path, capsys):
    """Of the empty and of the negative prompt, as the text encoder has them; without them it is asked again,
    or named."""
    encode(clips, tmp_path / "data", pipelines / "t2v")
    text, dit = load_text_encoder(pipelines / "t2v/text_encoder"), load_transformer(pipelines / "t2v")
    for kind, prompt in (("empty", ""), ("negative", families.WAN_NEGATIVE)):
        found = families.null_context(dit.config, kind, tmp_path / "data", tmp_path, "cpu")
        torch.testing.assert_close(found, text.encode([prompt])[0])
        # without the zeros behind it
        again = families.null_context(dit.config, kind, tmp_path, pipelines / "t2v", "cpu")
        torch.testing.assert_close(found[:len(again)], again)
        assert not found[len(again):].any()
    with pytest.raises(InputError, match="encode again"):
        families.null_context(dit.config, "empty", tmp_path, tmp_path, "cpu")
    run(train_align, "--model", pipelines / "t2v", "--data", tmp_path / "data", *SHORT, "--output_dir",
        tmp_path / "run",
        "--method", "sft", "--context_dropout", 0.5, "--num_validation", 2, "--num_inference_steps", 2)
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert (args["shift"], args["guidance_scale"], args["gradient_accumulation_steps"]) == (3, 5, 15)
    told = "30 videos per update: 1 x --batch_size 2 x --gradient_accumulation_steps 15"
    assert told in capsys.readouterr().out
    assert len(list((tmp_path / "run/samples/step-000002").glob("*.mp4"))) == 2


def test_what_is_not_said_is_wans_own(pipelines, tmp_path):
    """Published size, frames, rate, guidance, shift by size, negative prompt; the paper's 40 steps."""
    dit = load_transformer(pipelines / "t2v")
    config = sample.Config("a red circle")
    assert sample.settle(config, dit.config) == (832, 480)
    assert (config.frames, config.fps, config.num_inference_steps, config.guidance_scale,
            config.shift) == (81, 16, 40, 5, 3)
    assert config.negative_prompt.startswith("色调艳丽") and config.batch_size == 1
    config = sample.Config("a red circle", size="1280*720", guidance_scale=5.5)
    sample.settle(config, dit.config)
    assert config.shift == 5 and config.guidance_scale == 5.5


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_evaluation_of_wan(pipelines, tmp_path, capsys, kind):
    """Its own size, guidance and negative prompt, the panel and rewards, none of the toy's metrics; without
    prompts refused."""
    image = {}
    if kind == "i2v":
        picture = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(3))
        video.write_png(tmp_path / "first.png", picture)
        image = {"image": "first.png"}
    rows = [{"prompt": " ".join(WORDS[:i + 2])} | image for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_module(PAVRM.from_generator(load_transformer(pipelines / kind), 1), tmp_path / "reward")
    run(evaluate, "--model", pipelines / kind, "--prompts", tmp_path / "p.jsonl", f"a={pipelines / kind}",
        f"b={pipelines / kind}",
        "--reward", tmp_path / "reward", *FLAGS, "--num_inference_steps", 2, "--output_dir", tmp_path / "out")
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert table["config"]["guidance_scale"] == 5 and table["config"]["shift"] == 3
    assert "pavrm" in table["rows"]["a"] and "qualified" not in table["rows"]["a"]
    assert video.read_clip(tmp_path / "out/b/000002.mp4")[0].shape == (9, 32, 48, 3)
    for flags, words in (((), "--prompts FILE"), (("--prompts", tmp_path / "p.jsonl"), "give --model")):
        with pytest.raises(SystemExit) as end:
            run(evaluate, f"a={pipelines / kind}", *flags, "--output_dir", tmp_path / "no",
                *([] if not flags else FLAGS))
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
