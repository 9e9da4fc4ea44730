"""study/wan22.py: the commands of its parts, its tables, and the generators that it makes, at a tiny size."""
import json

import pytest
import torch
from test_endurance import work_in

import common
import evaluate
import families
import train_align
from experts import Experts
from formats.video import from_pixels
from formats.weights import SHIPPED, read_config, save_module
from model import VideoDiT, load_transformer
from pavrm import PAVRM
from study import endurance, parts, wan22
from world import clips, pretrain, scene

TINY = dict(dim=24, ffn_dim=32, num_heads=2, num_layers=1)


def test_the_parts_and_the_tables(tmp_path, monkeypatch):
    work, made = work_in(tmp_path, preset="full", seeds=1), {}
    share = {"two experts": 0.4, wan22.LOW: 0.7, wan22.HIGH: 0.5, wan22.BOTH: 0.8, "SFT": 0.6, "PRFL": 0.9}

    def run(self, wanted):
        (folder, last, *words), = wanted
        made[folder.name] = " ".join(map(str, words)).replace(f"{work.folder}/seed-0/", "")
        (folder / last).parent.mkdir(parents=True, exist_ok=True)
        asked = [word.split("=")[0] for word in map(str, words) if word.startswith("g")]        # evaluate.py
        names = ["base", wan22.ONE, wan22.START, wan22.LOW, wan22.HIGH, wan22.BOTH,
                 wan22.EVERY_STEP]
        names = names if len(asked) == len(names) else ["base", "SFT", "PRFL"]
        (folder / last).write_text(json.dumps({
            short: dict.fromkeys(wan22.GRADES, [float(i < 100 * share.get(name, 0.3)) for i in range(100)])
            | {"speed": [0.05] * 100} for short, name in zip(asked, names)}))

    monkeypatch.setattr(endurance, "HOME", tmp_path)
    monkeypatch.setattr(parts.Work, "run", run)
    wan22.wan22(work)
    assert " --expert low --boundary 0.5 --seed 0" in made["wan22-low"]
    assert "--expert high --seed 0" in made["wan22-prfl-high"]
    assert "--model wan22-experts" in made["wan22-prfl-both"] and "--model" not in made["wan22-one"]
    assert "--rollout_passes 0" in made["wan22-prfl-low-every-step"]
    assert f"--reward {SHIPPED['t2v']}/reward" in made["wan22-one"]
    assert "--reward wan22-pinned-reward/reward" in made["wan22-pinned-prfl"]
    assert "--reward" not in made["wan22-pinned-sft"]
    count = len(made)
    made.clear()
    wan22.finished(work)
    assert count == 13 and not made                             # nothing is made twice
    found = json.loads((tmp_path / "results/wan22.json").read_text())
    low = found["two experts"]["rows"][wan22.LOW]
    assert low["qualified"]["mean"] == 0.7 and low["speed"]["mean"] == 0.05
    *_, most = found["two experts"]["claims"]
    assert most["difference"] == pytest.approx(0.3 - 0.4 / 2)
    assert {claim["claim"]: claim["verdict"] for claim in found["pinned frame"]["claims"]} == {
        "PRFL above base": "holds", "PRFL above SFT": "holds", "SFT above base": "holds"}


def run(module, *argv):
    common.cli(module.main, module.Config, module.__doc__, [str(word) for word in argv])


@pytest.fixture
def times(monkeypatch):
    """The times that a VideoDiT is called with while it trains."""
    found, forward = [], VideoDiT.forward

    def watch(dit, x, t, *more, **conditions):
        if torch.is_grad_enabled():
            found.extend(t.tolist())
        return forward(dit, x, t, *more, **conditions)

    monkeypatch.setattr(VideoDiT, "forward", watch)
    return found


def trained(folder, monkeypatch, preset, *flags):
    """The transformer that pretraining makes at a tiny size."""
    monkeypatch.setitem(pretrain.GENERATORS, preset, pretrain.GENERATORS[preset] | TINY)
    run(pretrain, "dit", "--preset", preset, "--clips", 8, "--batch_size", 8, "--max_train_steps", 2,
        "--mixed_precision", "no", "--output_dir", folder, *flags)
    return folder / "transformer"


def test_two_experts_of_the_embedded_world(tmp_path, monkeypatch, times):
    one = trained(tmp_path / "high", monkeypatch, "tiny-t2v", "--expert", "high", "--boundary", 0.7)
    assert len(times) == 16 and all(0.7 <= t <= 1 for t in times)
    model = wan22.generator(tmp_path / "model", {"_class_name": "WanPipeline", "boundary_ratio": 0.7},
                            transformer=one, transformer_2=one)
    both = load_transformer(model)
    assert isinstance(both, Experts) and both.boundary == 0.7
    assert families.of_config(both.config).world == "tiny"


def test_a_pinned_frame_in_the_embedded_world(tmp_path, monkeypatch):
    """Samples, curated clips, validation and evaluation give the frame of a clean render, and it stays."""
    model = wan22.generator(tmp_path / "model",
                            transformer=trained(tmp_path / "base", monkeypatch, "tiny-i2v-pinned"))
    assert read_config(model / "transformer")["in_dim"] == 16
    short = ("--max_train_steps", 2, "--batch_size", 4, "--mixed_precision", "no", "--num_inference_steps", 2)
    dit = load_transformer(model)
    save_module(PAVRM.from_generator(dit, 1), tmp_path / "reward")
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    shards = clips.own_samples(tmp_path / "samples", dit, str(model), 16, 2, "tiny", 0, runtime)
    shards = shards.batch(range(16))
    frames, prompts, _ = scene.make(16, 10, "clean")
    with torch.no_grad():
        given = families.load_vae(model / "vae").encode(from_pixels(frames[:, :1]))
    assert shards["prompt"] == prompts and "condition" not in shards
    torch.testing.assert_close(shards["latents"][:, :, :1], given, atol=1e-4, rtol=1e-4)
    run(train_align, "--model", model, "--reward", tmp_path / "reward", "--num_curated", 16,
        "--num_validation", 4, *short, "--output_dir", tmp_path / "prfl")
    errors, measure = [], evaluate.measure

    def watch(videos, asked, clean):
        errors.append((videos[:, 0].float() - clean[:, 0].float()).abs().mean().item())
        return measure(videos, asked, clean)

    monkeypatch.setattr(evaluate, "measure", watch)
    run(evaluate, f"base={model}", f"prfl={tmp_path}/prfl", "--model", model, "--num_videos", 8, "--reward",
        tmp_path / "reward", "--num_inference_steps", 2, "--output_dir", tmp_path / "table")
    assert len(errors) == 3 and max(errors) < 5                 # of 255: the VAE's alone
