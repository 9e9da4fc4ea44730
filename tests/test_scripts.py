"""sample.py, evaluate.py, pretrain.py and reproduce.py: what they write, their arithmetic, their refusals."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import data
import evaluate
import pretrain
import reproduce
import sample
import world
from model import PRESETS, VideoDiT, load_text_encoder, load_transformer
from pavrm import load_pavrm
from vae import load_vae, from_pixels, to_pixels

SHIPPED = str(sample.Path(sample.__file__).parent / "checkpoints")


def run(script, *flags):
    common.cli(script.main, script.Config, script.__doc__, [str(flag) for flag in flags])


def refused(capsys, script, *flags):
    """The one line a script ends with for flags it cannot use."""
    with pytest.raises(SystemExit) as end:
        run(script, *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and lines[-1].startswith("error:"), lines
    return lines[-1]


def test_the_shipped_weights_fit_each_other_and_40_megabytes():
    dit = load_transformer(SHIPPED)
    assert load_pavrm(f"{SHIPPED}/reward", dit).config["transformer"]["num_layers"] < dit.config["num_layers"]
    assert load_text_encoder(f"{SHIPPED}/text_encoder").config["text_dim"] == dit.config["text_dim"]
    files = list(sample.Path(SHIPPED).rglob("*.safetensors"))
    assert len(files) == 4 and sum(f.stat().st_size for f in files) < 40e6


def test_the_shipped_vae_keeps_clean_clips_clean():
    videos, prompts, _ = world.make(200, 31, "clean")
    vae = load_vae(f"{SHIPPED}/vae")
    with torch.no_grad():
        decoded = to_pixels(vae.decode(vae.encode(from_pixels(videos))))
    assert world.annotate(decoded, prompts)["qualified"].float().mean() >= 0.985


def test_sample_writes_a_film_of_the_asked_colour(tmp_path, capsys):
    run(sample, "--prompt", "a red circle moving to the right", "--num_videos", 4, "--output", tmp_path / "x.mp4",
        "--contact_sheet", tmp_path / "sheets" / "x.png")
    films = torch.stack([data.read_video(tmp_path / f"x-{i}.mp4") for i in range(4)])
    assert films.shape == (4, 9, 32, 32, 3)
    assert world.annotate(films, ["red"] * 4)["adherent"].sum() >= 3
    assert (tmp_path / "sheets" / "x.png").read_bytes().startswith(b"\x89PNG")
    first = films.clone()
    run(sample, "--prompt", "a red circle moving to the right", "--num_videos", 2, "--output", tmp_path / "x.mp4")
    again = data.read_video(tmp_path / "x-1.mp4").float()        # noise depends on seed and index alone; codec rounding
    assert (again - first[1].float()).abs().mean() < 2 < (again - first[0].float()).abs().mean()


@pytest.mark.parametrize("flags, words", [
    (("--prompt", " "), "--prompt"), (("--prompt", "a", "--output", "x.avi"), ".mp4"),
    (("--prompt", "a", "--transformer", "nowhere"), "nowhere"), (("--prompt", "a", "--image", "x.png"), "--image"),
    (("--prompt", "a", "--contact_sheet", "x.gif"), ".png"), (("--prompt", "a", "--num_videos", "0"), "--num_videos"),
    ((), "--prompt")])
def test_sample_refuses(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, sample, *flags)
    assert not list(tmp_path.iterdir())


def test_evaluate_of_one_model_twice_is_a_tie(tmp_path, capsys):
    run(evaluate, f"a={SHIPPED}", f"b={SHIPPED}", "--num_videos", 16, "--num_inference_steps", 4, "--output_dir", tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["against_first"]["b"] == {"qualified_difference": 0.0, "interval": [0.0, 0.0], "win": 0.0, "tie": 1.0,
                                           "lose": 0.0}
    assert table["rows"]["a"] == table["rows"]["b"]
    assert table["rows"]["clean renders"]["qualified"]["mean"] > 0.9
    per_video = json.loads((tmp_path / "per_video.json").read_text())
    assert np.mean(per_video["a"]["qualified"]) == pytest.approx(table["rows"]["a"]["qualified"]["mean"])
    assert {f.name for f in tmp_path.iterdir()} == {"table.md", "table.json", "per_video.json", "videos.png",
                                                    "side_by_side.mp4"}


def test_evaluate_refuses(capsys, tmp_path):
    assert "one name" in refused(capsys, evaluate, "a=x", "a=y")
    assert str(tmp_path) in refused(capsys, evaluate, tmp_path)


def test_motion_smoothness_and_consistency_of_known_films():
    videos, prompts, _ = world.make(8, 5, "clean")
    still = videos[:, :1].expand(-1, 9, -1, -1, -1).contiguous()
    found = evaluate.measure(still, prompts)
    assert np.all(found["smoothness"] == 1) and np.allclose(found["consistency"], 1, atol=1e-5)
    flicker = still.clone()
    flicker[:, 1::2] = 255 - flicker[:, 1::2]
    expected = (still.float() - (255 - still.float())).abs().mean((1, 2, 3, 4)) / 255
    assert np.allclose(1 - evaluate.measure(flicker, prompts)["smoothness"], expected.numpy(), atol=1e-4)


def test_bootstrap_covers_the_mean_as_the_normal_interval_does():
    values = np.random.default_rng(0).normal(size=400)
    low, high = evaluate.bootstrap(values)
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=0.02) and high == pytest.approx(values.mean() + spread, abs=0.02)


def test_orthogonalise_gives_singular_values_near_one():
    m = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    for matrix in pretrain.orthogonalise(m).float(), pretrain.orthogonalise(m.mT).float():
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.5 and values.max() < 1.4


def test_pretraining_stages_run_and_resume_bit_for_bit(tmp_path, capsys):
    small = ("--clips", 32, "--batch_size", 4, "--validation_steps", 100, "--checkpointing_steps", 2, "--warmup_steps", 0,
             "--decay_steps", 4, "--mixed_precision", "no", "--vae_dim", 16, "--max_train_steps", 4)
    for stage, name in (("vae", "vae"), ("text", "text_encoder"), ("dit", "transformer")):
        whole, parts = tmp_path / stage / "whole", tmp_path / stage / "parts"
        run(pretrain, stage, *small, "--output_dir", whole)
        shutil.copytree(whole / "checkpoint-000002", parts / "checkpoint-000002")      # as if killed after step 2
        run(pretrain, stage, *small, "--output_dir", parts, "--resume", "latest")
        a, b = (folder / name / "diffusion_pytorch_model.safetensors" for folder in (whole, parts))
        assert a.read_bytes() == b.read_bytes(), stage


def test_pretrain_refuses(capsys, tmp_path):
    assert "stage" in refused(capsys, pretrain, "everything")
    assert "--init" in refused(capsys, pretrain, "dit", "--preset", "small-t2v", "--init", SHIPPED, "--clips", 4,
                               "--output_dir", tmp_path)


def test_a_text_to_video_generator_starts_an_image_to_video_one_that_computes_the_same():
    t2v = load_transformer(Path(__file__).parents[1] / "checkpoints").double()
    i2v = VideoDiT(**PRESETS["tiny-i2v"]).double()
    i2v.load_state_dict(pretrain.widened(t2v.state_dict(), 36))
    g = torch.Generator().manual_seed(0)
    x, y, context = (torch.randn(2, *shape, generator=g).double() for shape in ((16, 3, 4, 4), (20, 3, 4, 4), (8, 128)))
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(i2v(x, t, context, y=y), t2v(x, t, context))


# ---- reproduce.py
def test_interval_over_seeds_and_videos_grows_with_the_spread_of_either():
    assert reproduce.interval(np.full((3, 10), 0.5)) == [0.5, 0.5]
    width = lambda values: np.subtract(*reproduce.interval(values)[::-1])
    videos = np.random.default_rng(0).normal(size=(1, 400)).repeat(3, 0)  # seeds alike
    assert width(videos) == pytest.approx(2 * 1.96 * videos[0].std() / 20, rel=0.15)
    seeds = videos + np.array([[-0.3], [0.0], [0.3]])
    assert width(seeds) > 2 * width(videos)


def test_claims_are_judged_by_the_paired_difference():
    noise = np.random.default_rng(0).normal(size=(2, 300))
    values = {"a": noise + 0.05, "b": noise, "c": noise + np.random.default_rng(1).normal(size=(2, 300))}
    found = reproduce.judge_claims([("a", "b"), ("b", "a"), ("c", "b")], values)
    assert [c["verdict"] for c in found] == ["holds", "does not hold", "cannot be told"]
    assert found[0]["difference"] == pytest.approx(0.05)


def test_parts_with_the_same_flags_share_a_folder_and_others_do_not(tmp_path):
    names = [reproduce.named("prfl", flags) for flags in ((), ("--learning_rate", 3e-5), ("--learning_rate", 1e-4),
                                                          ("--no-sft_updates",), ("--reward_weight", 5.0))]
    assert len(set(names)) == 5 and all("/" not in name for name in names)


def test_reproduce_keeps_finished_parts_and_names_the_one_that_fails(tmp_path, capsys, monkeypatch):
    tiny = {"seeds": 1, "samples": 640, "reward_steps": 2, "tested": 128}
    monkeypatch.setitem(reproduce.PRESETS, "quick", tiny)
    argv = ["table7", "--preset", "quick", "--output_dir", str(tmp_path / "runs"), "--results_dir", str(tmp_path)]
    run = lambda: common.cli(reproduce.main, reproduce.Config, reproduce.__doc__, argv)
    run()
    assert capsys.readouterr().out.count("$ python train_reward.py") == 2
    found = json.loads((tmp_path / "table7.json").read_text())
    assert set(found["rows"]) == {"BCE", "BT"} and "| BCE | 80.05 |" in (tmp_path / "table7.md").read_text()
    run()
    assert "$ python" not in capsys.readouterr().out
    monkeypatch.setitem(tiny, "samples", 64)
    (tmp_path / "runs/quick/seed-0/reward/report.json").unlink()
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 2 and "train_reward.py" in capsys.readouterr().err.splitlines()[-1]
