"""sample.py, evaluate.py, pretrain.py and reproduce.py: what they write, compute and refuse."""
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import launch
import numpy as np
import pytest
import torch

import common
import data
import evaluate
import report
import sample
import train_align
import train_reward
import validation
from families import load_text_encoder, load_vae
from formats import lock, weights
from formats.video import from_pixels, read_video, to_pixels, write_png, write_video
from model import PRESETS, VideoDiT, export_transformer, first_frame_condition, load_transformer
from pavrm import PAVRM, load_pavrm
from study import parts, reproduce
from world import annotator, pretrain, scene

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


@pytest.fixture
def few_rounds(monkeypatch):
    """For tests that need no precise interval: it is made of 300 resamplings."""
    monkeypatch.setattr(report.confidence_interval, "__defaults__", (None, 300))


def test_the_shipped_weights_fit_each_other_and_60_megabytes():
    dit = load_transformer(SHIPPED)
    depth = load_pavrm(f"{SHIPPED}/reward", dit).config["transformer"]["num_layers"]
    assert depth <= dit.config["num_layers"]
    assert load_text_encoder(f"{SHIPPED}/text_encoder").config["text_dim"] == dit.config["text_dim"]
    files = {f.resolve() for f in sample.Path(SHIPPED).rglob("*.safetensors")}
    assert len(files) == 6 and sum(f.stat().st_size for f in files) < 60e6
    for folder in ("i2v", "mid"):
        load_transformer(f"{SHIPPED}/{folder}")
        for name in ("vae", "text_encoder"):
            assert (Path(SHIPPED) / folder / name).resolve() == Path(SHIPPED).resolve() / name


def test_the_shipped_vae_keeps_clean_clips_clean():
    videos, prompts, _ = scene.make(200, 31, "clean")
    vae = load_vae(f"{SHIPPED}/vae")
    with torch.no_grad():
        decoded = to_pixels(vae.decode(vae.encode(from_pixels(videos))))
    assert annotator.annotate(decoded, prompts)["qualified"].float().mean() >= 0.985


def test_sample_writes_a_film_of_the_asked_colour(tmp_path, capsys):
    prompt = "a red circle moving to the right"
    run(sample, "--prompt", prompt, "--num_videos", 4, "--output", tmp_path / "x.mp4",
        "--contact_sheet", tmp_path / "sheets" / "x.png")
    films = torch.stack([read_video(tmp_path / f"x-{i}.mp4") for i in range(4)])
    assert films.shape == (4, 9, 32, 32, 3)
    assert annotator.annotate(films, ["red"] * 4)["adherent"].sum() >= 3
    assert (tmp_path / "sheets" / "x.png").read_bytes().startswith(b"\x89PNG")
    first = films.clone()
    run(sample, "--prompt", prompt, "--num_videos", 2, "--output", tmp_path / "x.mp4")
    again = read_video(tmp_path / "x-1.mp4").float()            # noise is of seed and index; the codec rounds
    assert (again - first[1].float()).abs().mean() < 2 < (again - first[0].float()).abs().mean()


@pytest.mark.parametrize("flags, words", [
    (("--prompt", " "), "--prompt"), (("--prompt", "a", "--output", "x.avi"), ".mp4"),
    (("--prompt", "a", "--transformer", "nowhere"), "nowhere"),
    (("--prompt", "a", "--image", "x.png"), "--image"),
    (("--prompt", "a", "--contact_sheet", "x.gif"), ".png"),
    (("--prompt", "a", "--num_videos", "0"), "--num_videos"),
    (("--prompt", "a", "--prompts", "a.txt"), "--prompt")])
def test_sample_refuses(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, sample, *flags)
    assert not list(tmp_path.iterdir())


def test_evaluate_of_one_model_twice_is_a_tie(tmp_path, capsys, few_rounds):
    run(evaluate, f"a={SHIPPED}", f"b={SHIPPED}", "--num_videos", 16, "--num_inference_steps", 4,
        "--output_dir", tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["against_first"]["b"] == {"qualified_difference": 0.0, "interval": [0.0, 0.0],
                                           "win": 0.0, "tie": 1.0, "lose": 0.0}
    assert table["rows"]["a"] == table["rows"]["b"]
    assert table["rows"]["clean renders"]["qualified"]["mean"] > 0.9
    per_video = json.loads((tmp_path / "per_video.json").read_text())
    assert np.mean(per_video["a"]["qualified"]) == pytest.approx(table["rows"]["a"]["qualified"]["mean"])
    assert {f.name for f in tmp_path.iterdir()} - {lock.NAME} == {
        "table.md", "table.json", "per_video.json", "videos.png", "side_by_side.mp4", "side_by_side.gif"}


def test_evaluate_refuses(capsys, tmp_path):
    assert "one name" in refused(capsys, evaluate, "a=x", "a=y")
    assert str(tmp_path) in refused(capsys, evaluate, tmp_path)


def test_motion_smoothness_and_consistency_of_known_films():
    videos, prompts, _ = scene.make(8, 5, "clean")
    still = videos[:, :1].expand(-1, 9, -1, -1, -1).contiguous()
    found = evaluate.measure(still, prompts)
    assert np.all(found["smoothness"] == 1) and np.allclose(found["consistency"], 1, atol=1e-5)
    flicker = still.clone()
    flicker[:, 1::2] = 255 - flicker[:, 1::2]
    expected = (still.float() - (255 - still.float())).abs().mean((1, 2, 3, 4)) / 255
    assert np.allclose(1 - evaluate.measure(flicker, prompts)["smoothness"], expected.numpy(), atol=1e-4)


def test_bootstrap_covers_the_mean_as_the_normal_interval_does():
    values = np.random.default_rng(0).normal(size=400)
    low, high = evaluate.summary(values)["interval"]
    spread = 1.96 * values.std() / 20
    assert [low, high] == pytest.approx([values.mean() - spread, values.mean() + spread], abs=0.02)


def test_orthogonalise_gives_singular_values_near_one():
    m = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    for matrix in pretrain.orthogonalise(m).float(), pretrain.orthogonalise(m.mT).float():
        values = torch.linalg.svdvals(matrix)
        assert values.min() > 0.5 and values.max() < 1.4


def test_pretraining_stages_run_and_resume_bit_for_bit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "VALIDATED", 16)
    few = ("--batch_size", 4, "--max_train_steps", 4, "--warmup_steps", 0, "--decay_steps", 4,
           "--validation_steps", 100, "--checkpointing_steps", 2, "--mixed_precision", "no")
    for stage, name, more in (("vae", "vae", ("--clips", 32, "--vae_dim", 16)), ("text", "text_encoder", ()),
                              ("dit", "transformer", ("--clips", 32))):
        whole, parts, small = tmp_path / stage / "whole", tmp_path / stage / "parts", (*few, *more)
        run(pretrain, stage, *small, "--output_dir", whole)
        # as if killed after step 2
        shutil.copytree(whole / "checkpoint-000002", parts / "checkpoint-000002")
        run(pretrain, stage, *small, "--output_dir", parts, "--resume", "latest")
        a, b = (folder / name / "diffusion_pytorch_model.safetensors" for folder in (whole, parts))
        assert a.read_bytes() == b.read_bytes(), stage


def test_pretrain_refuses(capsys, tmp_path):
    assert "stage" in refused(capsys, pretrain, "everything")
    assert "--init" in refused(capsys, pretrain, "dit", "--preset", "small-t2v", "--init", SHIPPED,
                               "--clips", 4, "--output_dir", tmp_path)


def test_a_text_to_video_generator_starts_an_image_to_video_one_that_computes_the_same():
    t2v = load_transformer(Path(__file__).parents[1] / "checkpoints").double()
    i2v = VideoDiT(**PRESETS["tiny-i2v"]).double()
    i2v.load_state_dict(pretrain.widened(t2v.state_dict(), 36))
    g = torch.Generator().manual_seed(0)
    x, y, context = (torch.randn(2, *shape, generator=g).double()
                     for shape in ((16, 3, 4, 4), (20, 3, 4, 4), (8, 128)))
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(i2v(x, t, context, y=y), t2v(x, t, context))


# ---- image-to-video
@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """A folder like checkpoints/i2v with the text-to-video weights; those of the first frame are random."""
    folder = tmp_path_factory.mktemp("i2v")
    dit = VideoDiT(**PRESETS["tiny-i2v"])
    dit.load_state_dict(pretrain.widened(load_transformer(SHIPPED).state_dict(), 36))
    torch.nn.init.normal_(dit.patch_embedding.weight.data[:, 20:], std=0.02,
                          generator=torch.Generator().manual_seed(0))
    export_transformer(dit, folder / "transformer")
    for name in ("vae", "text_encoder"):
        (folder / name).symlink_to(Path(SHIPPED) / name)
    return folder


def test_task_picks_the_shipped_generator_and_model_says_its_task(i2v):
    def resolved(transformer=None, **given):
        config = sample.Config("x", **given)
        assert weights.resolve_model(config, transformer) == config.model
        return config.task, config.model

    assert resolved() == resolved(task="t2v") == resolved(model=SHIPPED) == ("t2v", SHIPPED)
    assert resolved(task="i2v") == resolved(transformer=i2v / "transformer") == ("i2v", f"{SHIPPED}/i2v")
    assert resolved(model=str(i2v)) == resolved(model=str(i2v), task="i2v") == ("i2v", str(i2v))
    assert resolved(model=SHIPPED, transformer=i2v) == ("i2v", SHIPPED)
    mid = train_align.Config(world="mid")
    assert weights.resolve_model(mid) == mid.model == f"{SHIPPED}/mid" and mid.task == "t2v"


def test_a_world_whose_generator_is_not_shipped_needs_a_model(i2v):
    assert weights.resolve_model(train_align.Config(world="small", model=str(i2v))) == str(i2v)
    assert weights.resolve_model(train_align.Config(world="mid", model=SHIPPED)) == SHIPPED
    for config in (train_align.Config(world="small"), train_reward.Config(world="mid", task="i2v")):
        with pytest.raises(common.InputError,
                           match=f"--world {config.world}: no .* is shipped: name one with --model"):
            weights.resolve_model(config)
    with pytest.raises(common.InputError, match="--world small: no t2v generator"):
        evaluate.main(evaluate.Config(world="small"))


def test_a_task_at_odds_with_the_model_is_refused(i2v, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, first in ((train_reward, ()), (train_align, ()), (sample, ("--prompt", "x"))):
        for task, model, kind in (("i2v", SHIPPED, "t2v"), ("t2v", i2v, "i2v")):
            assert f"--task is {task}, but the generator in {model} is {kind}" \
                in refused(capsys, script, *first, "--task", task, "--model", model)
    line = refused(capsys, evaluate, f"a={SHIPPED}", f"b={i2v}")
    assert f"--task is t2v, but the generator in {i2v} is i2v" in line
    assert "--task is i2v" in refused(capsys, evaluate, f"a={SHIPPED}", "--task", "i2v")
    assert "'v2v'" in refused(capsys, train_align, "--task", "v2v")
    assert not list(tmp_path.iterdir())


def test_sample_starts_from_the_given_image(i2v, tmp_path, capsys, monkeypatch):
    frame = scene.make(1, 3, "clean")[0][0, 0]                                                  # [32, 32, 3]
    # 97x115, centred
    large = np.pad(frame.numpy().repeat(3, 0).repeat(3, 1), ((0, 1), (10, 9), (0, 0)), mode="edge")
    write_png(tmp_path / "small.png", frame)
    write_png(tmp_path / "odd.png", large)
    write_video(tmp_path / "film.mp4", torch.stack([frame, 255 - frame]))
    given = []

    def still(dit, pavrm, shape, context, seed, indices, steps, n, drops, *, y, **other):
        """A generator that does as it is told: the first frame stays."""
        given.append(y)
        return y[:, 4:, :1].expand(-1, -1, shape[1], -1, -1), steps

    monkeypatch.setattr(sample.search, "best_of", still)
    with torch.no_grad():
        vae = load_vae(f"{SHIPPED}/vae")
        wanted = first_frame_condition(vae.encode(from_pixels(frame[None, None])).expand(2, -1, 3, -1, -1))
    for name, tolerance in (("small.png", 0), ("film.mp4", 0.1), ("odd.png", 0.1)):
        run(sample, "--model", i2v, "--prompt", "red", "--image", tmp_path / name, "--num_videos", 2,
            "--output", tmp_path / "x.mp4")
        y = given.pop()
        assert torch.equal(y[:, :4], wanted[:, :4]) and not y[:, 4:, 1:].any()
        assert (y - wanted).abs().mean() <= tolerance * wanted[:, 4:, 0].abs().mean()
        assert (read_video(tmp_path / "x-1.mp4")[0].float() - frame.float()).abs().mean() < 8  # of 255


def test_sample_refuses_images(i2v, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_png("good.png", scene.make(1, 3, "clean")[0][0, 0])
    good = Path("good.png").read_bytes()
    for name, content in (("cut.png", good[:len(good) // 2]), ("text.png", b"hello"), ("empty.png", b"")):
        Path(name).write_bytes(content)
    before, flags = sorted(tmp_path.iterdir()), ("--model", i2v, "--prompt", "red")
    for name in ("cut.png", "text.png", "empty.png"):
        assert f"{name}: damaged" in refused(capsys, sample, *flags, "--image", name)
    assert "none.png: there is no such file" in refused(capsys, sample, *flags, "--image", "none.png")
    assert "--image is needed" in refused(capsys, sample, *flags)
    assert sorted(tmp_path.iterdir()) == before


def test_i2v_subject_is_the_likeness_to_the_given_frame():
    videos, prompts, _ = scene.make(8, 5, "clean")
    still = videos[:, :1].expand(-1, 9, -1, -1, -1).contiguous()
    assert np.allclose(evaluate.measure(still, prompts, videos)["i2v_subject"], 1, atol=1e-5)
    assert np.all(evaluate.measure(videos, prompts, videos)["i2v_subject"] > 0.9)
    other = videos[:, :, :, :, [1, 2, 0]].contiguous()          # of another colour
    assert np.all(evaluate.measure(other, prompts, videos)["i2v_subject"] < 0.9)
    assert "i2v_subject" not in evaluate.measure(videos, prompts)


def test_image_to_video_from_samples_to_evaluation(i2v, tmp_path, capsys, monkeypatch, few_rounds):
    """Every stage on the embedded world. The reward model's condition is that of the given first frame."""
    seen, forward = [], PAVRM.forward

    def watch(self, x, t, context, **conditions):
        seen.append(conditions["y"].detach().clone())
        return forward(self, x, t, context, **conditions)

    def are_given(latents):
        """The reward model saw masks of frame 0, first frames of latents [n, c, f, h, w], then zeros."""
        y = torch.cat(seen)
        seen.clear()
        distance = torch.cdist(y[:, 4:, 0].flatten(1), latents[:, :, 0].flatten(1),
                               compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        return bool(distance.max() < 1e-3 and y[:, :4, 0].eq(1).all() and not y[:, :, 1:].any())

    monkeypatch.setattr(PAVRM, "forward", watch)
    fast = ("--mixed_precision", "no", "--num_inference_steps", 4)
    run(train_reward, "--model", i2v, "--num_samples", 128, "--max_train_steps", 2, "--batch_size", 16,
        "--holdout", 16, "--depth", 1, *fast, "--output_dir", tmp_path / "reward")
    shards = data.Shards(tmp_path / "reward/samples").batch(range(128))
    frames, prompts, _ = scene.make(128, 10, "clean")
    with torch.no_grad():
        given = load_vae(f"{SHIPPED}/vae").encode(from_pixels(frames[:, :1]))
    assert shards["prompt"] == prompts                          # the given frames show what the prompts say
    torch.testing.assert_close(shards["condition"][:, :, :1], given, atol=1e-4, rtol=1e-4)
    assert not shards["condition"][:, :, 1:].any()
    assert are_given(given)
    seen.append(first_frame_condition(shards["latents"]))
    assert not are_given(given)                                 # the samples' own first latents are others

    run(train_align, "--model", i2v, "--reward", tmp_path / "reward/reward", "--num_curated", 16,
        "--max_train_steps", 2, "--batch_size", 4, "--num_validation", 4, *fast,
        "--output_dir", tmp_path / "prfl")
    assert are_given(data.Shards(tmp_path / "prfl/curated/latents").batch(range(16))["latents"])
    assert json.loads((tmp_path / "prfl/args.json").read_text())["task"] == "i2v"
    last = (tmp_path / "prfl/metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["validation_qualified"] >= 0

    run(evaluate, f"base={i2v}", f"prfl={tmp_path}/prfl", "--model", i2v, "--num_videos", 16,
        "--reward", tmp_path / "reward/reward", *fast, "--output_dir", tmp_path / "evaluation")
    clean = from_pixels(scene.make(16, 7000, "clean", split="test")[0])
    with torch.no_grad():
        assert are_given(load_vae(f"{SHIPPED}/vae").encode(clean))
    rows = json.loads((tmp_path / "evaluation/table.json").read_text())["rows"]
    assert rows["clean renders"]["i2v_subject"]["mean"] > max(0.9, rows["base"]["i2v_subject"]["mean"])
    assert "I2V subject" in (tmp_path / "evaluation/table.md").read_text()


def test_the_shipped_image_to_video_weights(tmp_path, capsys, few_rounds):
    dit = load_transformer(f"{SHIPPED}/i2v")
    assert dit.config["model_type"] == "i2v"
    run(evaluate, "--task", "i2v", f"base={SHIPPED}/i2v", "--num_videos", 32, "--output_dir", tmp_path)
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert rows["base"]["i2v_subject"]["mean"] > 0.9 and rows["base"]["qualified"]["mean"] > 0.2


# ---- reproduce.py
def test_interval_over_seeds_and_videos_grows_with_the_spread_of_either():
    assert report.confidence_interval(np.full((3, 10), 0.5)) == [0.5, 0.5]
    width = lambda values: np.subtract(*report.confidence_interval(values)[::-1])
    videos = np.random.default_rng(0).normal(size=(1, 400)).repeat(3, 0)  # seeds alike
    assert width(videos) == pytest.approx(2 * 1.96 * videos[0].std() / 20, rel=0.15)
    seeds = videos + np.array([[-0.3], [0.0], [0.3]])
    assert width(seeds) > 2 * width(videos)


def test_seeds_widen_the_interval_as_the_unbiased_variance_of_their_mean_does():
    studies = np.random.default_rng(0).normal(size=(60, 8, 1))  # 8 seeds, whose videos all agree
    widths = [np.subtract(*report.confidence_interval(study)[::-1]) for study in studies]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * studies.std(1, ddof=1).mean() / 8 ** 0.5, rel=0.03)


def test_claims_are_judged_by_the_paired_difference():
    noise = np.random.default_rng(0).normal(size=(2, 300))
    values = {"a": noise + 0.05, "b": noise, "c": noise + np.random.default_rng(1).normal(size=(2, 300))}
    found = report.claim_verdicts([("a", "b"), ("b", "a"), ("c", "b")], values)
    assert [c["verdict"] for c in found] == ["holds", "does not hold", "cannot be told"]
    assert found[0]["difference"] == pytest.approx(0.05)
    text = "\n".join(report.claims_table(found + report.claim_verdicts([("a", "b", "alike")], values)))
    assert text.count("| a above b | yes | +0.050 [+0.050, +0.050] | +0.050 +0.050 | holds |") == 1
    assert text.count("| a above b | alike |") == 1


def test_unpaired_claims_are_judged_by_groups_of_other_videos():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(0.5, 1, (1, 400)), "b": rng.normal(0, 1, (1, 300)),
              "c": rng.normal(0.45, 1, (1, 200))}
    found = report.claim_verdicts([("a", "b"), ("b", "a"), ("a", "c")], values, paired=False)
    assert [c["verdict"] for c in found] == ["holds", "does not hold", "cannot be told"]
    # of the difference of two means
    spread = 1.96 * (values["a"].var() / 400 + values["b"].var() / 300) ** 0.5
    assert np.subtract(*found[0]["interval"][::-1]) == pytest.approx(2 * spread, rel=0.1)
    # the same in both: they cancel
    seeds = {name: x + np.array([[-1.0], [0.0], [1.0]]) for name, x in values.items()}
    again, = report.claim_verdicts([("a", "b")], seeds, paired=False)
    assert np.allclose(again["interval"], found[0]["interval"], atol=0.05)


def test_accuracy_rows_are_those_of_each_seed():
    logits = torch.tensor([[[1.0, -1, 1, -1]] * 5, [[1.0, 1, 1, 1]] * 5])  # [2 seeds, 5, 4]
    right, row = reproduce.accuracy_row(logits, torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]))
    assert row["average"]["seeds"] == [0.75, 0.75] and row["intervals"] == [0.75] * 5
    assert right.shape == (2, 5, 4)
    assert row["balanced"] == pytest.approx([(5 / 6 + 1 / 2) / 2] * 5)


def test_balanced_values_have_the_mean_and_the_spread_of_balanced_accuracy():
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(1, 2000, generator=g) < 0.2).long()
    share = torch.where(labels == 1, 0.6, 0.9)[:, None]
    right = (torch.rand(1, 5, 2000, generator=g) < share).double().numpy()
    values = report.balanced_values(right, labels)
    accuracy = lambda right, labels: (right[:, labels == 1].mean(1) + right[:, labels == 0].mean(1)) / 2
    assert values.mean(2)[0] == pytest.approx(accuracy(right[0], labels[0]))
    picks = np.random.default_rng(0).integers(0, 2000, (2000, 2000))
    wanted = np.quantile([accuracy(right[0][:, pick], labels[0][pick]).mean() for pick in picks],
                         (0.025, 0.975))
    assert report.confidence_interval(values.mean(1)) == pytest.approx(wanted, abs=0.003)


def test_auc_values_have_the_mean_and_the_spread_of_the_auc():
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(1, 600, generator=g) < 0.3).long()
    logits = torch.randn(1, 5, 600, generator=g) + 0.8 * labels[:, None]
    values = report.auc_values(logits, labels)
    assert values.mean(2)[0] == pytest.approx([validation.auc(row, labels[0]) for row in logits[0]])
    picks = torch.randint(0, 600, (1000, 600), generator=g)
    wanted = np.quantile([validation.auc(logits[0, 0, pick], labels[0, pick]) for pick in picks],
                         (0.025, 0.975))
    assert report.confidence_interval(values[:, 0]) == pytest.approx(wanted, abs=0.005)


def test_table9_of_a_reward_model_that_errs_on_other_generators_near_clean(tmp_path, monkeypatch, few_rounds):
    """It is right on its own base, and on the others of a fifth of their videos it is not, where t < .2."""
    def test_set(work, folder=None, generator=None):
        n = 400 if folder is None else 300
        labels = (torch.arange(n) % 4 == 0).to(torch.int8)
        errs = torch.arange(n) // 4 % 5 == 0 if folder is not None else torch.zeros(n, dtype=torch.bool)
        context = torch.stack([2.0 * labels - 1, 1 - 2.0 * errs], 1)[:, None]                   # [n, 1, 2]
        return torch.zeros(n, 1, 1, 1, 1), context, labels

    for name in ("load_transformer", "train_rewards", "train_aligned"):
        monkeypatch.setattr(reproduce, name, lambda *args: None)
    monkeypatch.setattr(reproduce, "test_set", test_set)
    monkeypatch.setattr(reproduce, "reward_fn_of", lambda work, seed, flags:
                        lambda x, t, context: context[:, 0, 0] * torch.where(t < 0.2, context[:, 0, 1], 1.0))
    config = reproduce.Config("table9", "quick", seeds=2, output_dir=str(tmp_path), results_dir=str(tmp_path))
    reproduce.table9(parts.Work(config))
    found = json.loads((tmp_path / "table9.json").read_text())
    own, *others = found["rows"].values()
    assert own["average"]["mean"] == 1 and own["balanced"] == own["auc"] == [1] * 5 and len(others) == 4
    for row in others:
        assert row["good"] == 0.25 and row["average"]["mean"] == pytest.approx(0.96)            # (.8 + 4) / 5
        assert [*row["intervals"], *row["balanced"]] == pytest.approx([0.8, 1, 1, 1, 1] * 2)
    assert [claim["verdict"] for claim in found["claims"]] == ["holds"] * 5
    assert found["claims"][0]["difference"] == pytest.approx(0.04)


def test_fig3_judges_each_panel_where_the_paper_does(tmp_path, monkeypatch, few_rounds):
    """Pixels are right only where t < .5, so their verdicts swing. At t = .2 a probe of K of 8 blocks is
    right on K of 8 videos."""
    n = 600
    labels = (torch.arange(n) % 2).to(torch.int8)
    context = torch.stack([2.0 * labels - 1, torch.arange(n) / n], 1)[:, None]                  # [n, 1, 2]

    def judge_of(work, seed, flags):
        good, order = lambda context: context[:, 0, 0], lambda context: context[:, 0, 1]
        if "--space" in flags:
            return lambda x, t, context: good(context) * torch.where(t < 0.5, 1.0, -1.0)
        if "--trunk_learning_rate" in flags and "--fixed_t" in flags:
            depth = flags[flags.index("--depth") + 1] if "--depth" in flags else 8
            known = lambda t, context: (order(context) < depth / 8) & (t == 0.2)
            return lambda x, t, context: good(context) * torch.where(known(t, context), 1.0, -1.0)
        return lambda x, t, context: good(context)

    monkeypatch.setattr(reproduce, "train_rewards", lambda *args: None)
    monkeypatch.setattr(reproduce, "test_set", lambda work: (torch.zeros(n, 1, 1, 1, 1), context, labels))
    monkeypatch.setattr(reproduce, "reward_fn_of", judge_of)
    reproduce.fig3(parts.Work(reproduce.Config("fig3", "quick", seeds=2, output_dir=str(tmp_path),
                                               results_dir=str(tmp_path))))
    claims = {claim["claim"]: claim for claim in json.loads((tmp_path / "fig3.json").read_text())["claims"]}
    swing = claims["swing of pixels, all frames above swing of fine-tuned, random t"]
    # .5, 1, 1 of 4
    assert swing["verdict"] == "holds" and swing["difference"] == pytest.approx(0.625, abs=0.03)
    depth = claims["probe, t = 0.2, K = 8 at 0.2 above probe, t = 0.2, K = 1 at 0.2"]
    assert depth["difference"] == pytest.approx(7 / 8, abs=0.01) and depth["paper"].startswith("alike")
    assert claims["fine-tuned, random t above pixels, all frames"]["verdict"] == "holds"
    assert claims["pixels, all frames above probe, random t"]["verdict"] == "does not hold"


def test_parts_of_image_to_video_lie_apart(tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PRESETS, "quick",
                        {"seeds": 1, "samples": 8, "reward_steps": 2, "iterations": 2})
    work = parts.Work(reproduce.Config("table2", "quick", output_dir=str(tmp_path)))
    calls = []
    monkeypatch.setattr(work, "run", calls.extend)
    monkeypatch.setattr(parts, "curated", lambda work: tmp_path / "curated")
    for flags in ((), parts.I2V):
        parts.train_rewards(work, [flags])
        parts.train_aligned(work, [(0, method, flags) for method in ("sft", "prfl")])
    halves = calls[:len(calls) // 2], calls[len(calls) // 2:]
    written = [{str(part[0]) for part in half} for half in halves]
    given = [{str(word) for part in half for word in part[3:]
              if str(word).startswith(str(work.folder / "seed-0"))}
             for half in halves]
    # samples and reward
    assert not written[0] & written[1] and not given[0] & given[1] and len(given[1]) == 2
    assert all("i2v" in part for part in halves[1]) and not any("i2v" in part for part in halves[0])


def test_parts_with_the_same_flags_share_a_folder_and_others_do_not(tmp_path):
    names = [parts.named("prfl", flags) for flags in (
        (), ("--learning_rate", 3e-5), ("--learning_rate", 1e-4), ("--no-sft_updates",),
        ("--reward_weight", 5.0))]
    assert len(set(names)) == 5 and all("/" not in name for name in names)


def test_equal_time_is_that_of_the_updates_in_each_methods_own_run(tmp_path, monkeypatch):
    """An SFT update takes 1 s in one run and 2 s in a busier one: only ratios within a run count."""
    monkeypatch.setitem(parts.PRESETS, "quick",
                        {"seeds": 1, "samples": 8, "reward_steps": 2, "iterations": 60})
    for name in ("train_rewards", "train_aligned"):
        monkeypatch.setattr(reproduce, name, lambda *args: None)
    work = parts.Work(reproduce.Config("table1", "quick", output_dir=str(tmp_path)))
    for method, flags, sft, reward in (("prfl", (), 1, 3), ("refl", ("--frames_decoded", "first"), 2, 8),
                                       ("refl", ("--frames_decoded", "all"), 1, 11)):
        folder = parts.align_folder(work, 0, method, flags)
        folder.mkdir(parents=True)
        rows = [{"step": 0, "validation_qualified": 0.3},
                *({"reward": 0.1, "sft_seconds": sft, "reward_seconds": reward},) * 3]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert reproduce.steps_of_equal_time(work) == {"sft": 240, "first": 48, "all": 20}
    variants = reproduce.table1_variants(work)
    assert variants["RGB ReFL, all frames, equal time"] == (
        "refl", ("--frames_decoded", "all", "--max_train_steps", 20))
    assert list(variants)[-1] == "PRFL" and len(variants) == 9


def test_reproduce_keeps_finished_parts_and_names_the_one_that_fails(tmp_path, capsys, monkeypatch,
                                                                     few_rounds):
    tiny = {"seeds": 1, "samples": 96, "reward_steps": 2, "study_steps": 1, "tested": 32}
    monkeypatch.setitem(parts.PRESETS, "quick", tiny)
    monkeypatch.setattr(parts, "subprocess", SimpleNamespace(run=subprocess.run, Popen=launch.Popen))
    argv = ["table7", "--preset", "quick", "--output_dir", str(tmp_path / "runs"),
            "--results_dir", str(tmp_path)]
    run = lambda: common.cli(reproduce.main, reproduce.Config, reproduce.__doc__, argv)

    def refused():
        assert pytest.raises(SystemExit, run).value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    run()
    assert capsys.readouterr().out.count("$ python train_reward.py") == 2
    found = json.loads((tmp_path / "table7.json").read_text())
    assert set(found["rows"]) == {"BCE", "BT"} and "| BCE | 80.05 |" in (tmp_path / "table7.md").read_text()
    spent = sum(parts.part_of(folder)["seconds"]
                for folder in (tmp_path / "runs/quick/seed-0").glob("reward*")) / 60
    assert found["provenance"]["minutes_of_parts"] == pytest.approx(spent, abs=0.06) and spent > 0
    run()
    assert "$ python" not in capsys.readouterr().out
    again = json.loads((tmp_path / "table7.json").read_text())
    assert again["provenance"]["minutes_of_parts"] == found["provenance"]["minutes_of_parts"]
    assert again["rows"] == found["rows"]
    assert found["provenance"]["commits_of_parts"] == [parts.commit()] and found["provenance"]["parts"] == 2
    unknown = tmp_path / "runs/quick/seed-0/reward-max_train_steps-1/part.json"
    note = unknown.read_text()
    unknown.unlink()
    assert "was made by `an unknown command`" in refused()
    unknown.write_text(note)
    monkeypatch.setitem(tiny, "samples", 64)
    said = refused()
    assert "was made by" in said and "--num_samples 96 " in said and "--num_samples 64 " in said
    # made anew: but the samples there are others
    shutil.rmtree(tmp_path / "runs/quick/seed-0/reward-max_train_steps-1")
    said = refused()
    assert "ended with code 2" in said and "train_reward.py" in said


# ---- search
def test_best_of_is_what_search_gives_and_lifts_the_base(tmp_path, capsys, few_rounds):
    how = ("--num_videos", 32, "--num_inference_steps", 8, "--mixed_precision", "no")
    run(evaluate, f"base={SHIPPED}", *how, "--output_dir", tmp_path / "one")
    run(evaluate, f"base={SHIPPED}", *how, "--best_of", 4, "--search", "drop", "--drops", ".5:1",
        "--output_dir", tmp_path / "four")
    run(evaluate, f"base={SHIPPED}", *how, "--best_of", 4, "--output_dir", tmp_path / "resampled")
    one, four, resampled = (json.loads((tmp_path / name / "per_video.json").read_text())["base"]
                            for name in ("one", "four", "resampled"))
    assert np.mean(four["qualified"]) > np.mean(one["qualified"]) + 0.1
    assert np.mean(resampled["qualified"]) > np.mean(one["qualified"]) + 0.3
    # 4 (4 + K / L) + 4, and four candidates for five steps with four rewards
    for name, said in (("four", "the others dropped), 24"), ("resampled", "resampled), 39")):
        assert f"best of 4 by the reward ({said} forward passes" in (tmp_path / name / "table.md").read_text()


@pytest.mark.parametrize("flags, words", [
    (("--best_of", 8, "--search", "drop", "--drops", "half"), "--drops half"),
    (("--best_of", 8, "--drops", "0:1"), "--search"), (("--search", "drop"), "--best_of 1"),
    (("--reward", "x"), "--best_of"),
    (("--best_of", 2, "--reward", "nowhere"), "nowhere"), (("--best_of", 0), "--best_of")])
def test_search_refuses(capsys, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, sample, "--prompt", "a", *flags)
    assert not list(tmp_path.iterdir())


def test_sample_says_what_the_best_of_n_costs(tmp_path, capsys):
    run(sample, "--prompt", "a red circle", "--best_of", 8, "--num_inference_steps", 16, "--output",
        tmp_path / "x.mp4")
    assert "best of 8: 150 forward passes" in capsys.readouterr().out and (tmp_path / "x.mp4").exists()
