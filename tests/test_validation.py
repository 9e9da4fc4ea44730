"""What is watched: the panel against known films, validations on own data by ranks and kinds, judge, best/,
patience."""
import json
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from tiny import DRIVER, STEPS, command, distance, generator, metrics, run, weights

import common
import data
import train_align
import validation
from common import Runtime
from formats.video import read_video
from formats.weights import save_module
from model import load_transformer
from pavrm import PAVRM, load_pavrm
from scale import parallel
from world import scene

WATCH = ["--num_validation", "7", "--validation_steps", "2"]


# ---- the panel
def test_the_flow_of_a_sliding_picture():
    """A soft texture that slides by a known distance each frame, and one that stands still."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    for step in (0.5, 1.0, 2.0):
        films = torch.stack([128 + 60 * torch.sin((x - step * k) / 5) + 50 * torch.cos((y + x - step * k) / 6)
                             for k in range(6)])
        found = validation.largest_flow(films.round().to(torch.uint8)[None, ...,
                                                                      None].expand(1, 6, 64, 96, 3))
        assert found.item() == pytest.approx(step / 96, rel=0.2)
    still = films[:1].expand(6, 64, 96).round().to(torch.uint8)[None, ..., None].expand(1, 6, 64, 96, 3)
    assert validation.largest_flow(still).item() == 0
    real = scene.make(16, 3, "clean")[0]
    assert validation.dynamic_degree(validation.largest_flow(real), validation.largest_flow(real)).all()
    frozen = real[:, :1].expand(-1, 9, -1, -1, -1)
    assert not validation.dynamic_degree(validation.largest_flow(frozen), validation.largest_flow(real)).any()


def test_the_panel_by_hand():
    films = torch.zeros(2, 3, 4, 4, 3, dtype=torch.uint8)
    films[0, 1, :, 2:, 0] = 255                                 # the right half turns red in the middle frame
    found = validation.panel(films)
    assert found["brightness"].tolist() == pytest.approx([1 / 6, 0])
    assert found["saturation"].tolist() == pytest.approx([1 / 6, 0])
    assert found["speed"].tolist() == pytest.approx([1 / 6,
                                                     0])     # of 3 channels half of the pixels, both steps
    assert found["sharpness"].tolist() == pytest.approx([1 / 27,
                                                         0])    # edge of 1/3 in 1 of 3 columns and frames
    brighter = validation.panel(torch.full((1, 3, 4, 4, 3), 128, dtype=torch.uint8))
    assert brighter["brightness"].item() == pytest.approx(128 / 255) and brighter["saturation"].item() == 0


# ---- validations of own data
@pytest.fixture(scope="module")
def second(folder):
    """Another reward model on disk."""
    torch.manual_seed(9)
    save_module(PAVRM.from_generator(generator(), 2), folder / "second")
    return folder / "second"


@pytest.fixture(scope="module")
def watched(folder, cpu, second):
    run(*command(folder, "prfl", "watched", *WATCH, "--judge", str(second), "--learning_rate", "1e-3"))
    return folder / "watched"


def test_what_a_validation_writes(folder, watched, second):
    rows = metrics(folder, "watched")
    assert [row["step"] for row in rows if "validation_judge" in row] == [0, 2, 4, 5]
    values = json.loads((watched / "samples/step-000004.json").read_text())
    assert len(values["prompts"]) == 7 and set(values["real"]) == {*validation.PANEL, "dynamic"}
    wanted = {*validation.PANEL, "dynamic", "sft_loss", "judge", "judge_other_prompt",
              *(f"judge_t{k}" for k in range(1, 6))}
    assert set(values["values"]) == wanted and all(len(row) == 7 for row in values["values"].values())
    row = next(row for row in rows if row["step"] == 4)
    assert all(row[f"validation_{name}"] == pytest.approx(np.mean(values["values"][name])) for name in wanted)
    assert len(list((watched / "samples/step-000004").glob("*.mp4"))) == 7
    assert read_video(watched / "samples/step-000004/0.mp4").shape == (5, 32, 32, 3)
    assert (watched / "samples/step-000004.png").read_bytes().startswith(b"\x89PNG")


def test_the_values_by_hand(folder, watched, second):
    """Held-out clips are not trained on; samples, judge and SFT loss of step 0 are those of the base."""
    shards, judge = data.Shards(folder / "data"), load_pavrm(second)
    dit = load_transformer(folder / "generator")
    good = (shards.labels != 0).nonzero()[:, 0]
    train, held = data.split(len(good), 7, 0)
    batch = shards.batch(good[held])
    values = json.loads((watched / "samples/step-000000.json").read_text())
    assert values["prompts"] == batch["prompt"]

    def noise(key, k, i, shape):
        return torch.randn(shape, generator=common.random_generator(900, key, k, i))

    with torch.no_grad():
        x = torch.stack([noise("sample", 0, i, (16, 2, 4, 4)) for i in range(7)])
        for i in range(4):
            x = x - dit(x, torch.full((7,), 1 - i / 4), batch["context"]) / 4
        t = torch.tensor([(2 + validation.uniform(900, "interval t", 2, [i]).item()) / 5 for i in range(7)])
        t = t.view(-1, 1, 1, 1, 1)
        x1 = torch.stack([noise("interval noise", 2, i, (16, 2, 4, 4)) for i in range(7)])
        logits = judge((1 - t) * x + t * x1, t.flatten(), batch["context"])
        others = 0
        for k in range(5):                                      # each sample with the next one's prompt
            t = torch.tensor([(k + validation.uniform(900, "interval t", k, [i]).item()) / 5
                              for i in range(7)])
            t = t.view(-1, 1, 1, 1, 1)
            x1 = torch.stack([noise("interval noise", k, i, (16, 2, 4, 4)) for i in range(7)])
            others += judge((1 - t) * x + t * x1, t.flatten(), batch["context"].roll(-1, 0)).sigmoid() / 5
        losses = 0
        for k in range(4):
            t, x1 = (k + 0.5) / 4, torch.stack([noise("held-out x1", k, int(i), (16, 2, 4, 4))
                                                for i in good[held]])
            v = dit((1 - t) * batch["latents"] + t * x1, torch.full((7,), t), batch["context"])
            losses += (v - x1 + batch["latents"]).square().mean((1, 2, 3, 4)) / 4
    assert values["values"]["judge_t3"] == pytest.approx(logits.tolist(), rel=1e-4)
    assert values["values"]["judge_other_prompt"] == pytest.approx(others.tolist(), rel=1e-4)
    assert values["values"]["sft_loss"] == pytest.approx(losses.tolist(), rel=1e-4)


def test_best_is_the_checkpoint_the_judge_likes_best(folder, watched):
    scores = {row["step"]: row["validation_score"]
              for row in metrics(folder, "watched") if "validation_score" in row}
    best = 0
    for step, score in scores.items():
        best = step if score > scores[best] else best
    assert best > 0, "the tiny run does not improve: this test needs another learning rate"
    note = json.loads((watched / "best/best.json").read_text())
    assert note["step"] == best and note["score"] == scores[best]
    kept = load_transformer(watched / "best").state_dict()
    assert distance(kept, load_transformer(watched / f"checkpoint-{best:06d}").state_dict()) == 0
    assert not list(watched.glob("best.*"))


def test_a_sample_that_is_liked_whatever_was_asked_for_counts_less():
    assert validation.judges_score({"validation_judge": 0.8,
                                    "validation_judge_other_prompt": 0.2}) == pytest.approx(0.7)
    assert validation.judges_score({"validation_judge": 0.9,
                                    "validation_judge_other_prompt": 0.7}) == pytest.approx(0.55)


def test_three_ranks_under_ddp_and_fsdp_see_what_one_sees(folder, watched, second, tmp_path):
    """Seven prompts and three ranks; a training batch that is one rank's, split, and another number of steps
    to wait for."""
    runs = []
    for kind in ("ddp", "fsdp"):
        script, argv = command(folder, "prfl", str(tmp_path / kind), *WATCH, "--judge", str(second),
                               "--learning_rate", "1e-9",
                               "--parallel", kind, "--patience", "1", batch_size=1)
        runs.append((script, argv))
    launch.torchrun(3, "-c", DRIVER, json.dumps(runs))
    one = json.loads((watched / "samples/step-000000.json").read_text())["values"]
    for kind in ("ddp", "fsdp"):
        found = json.loads((tmp_path / kind / "samples/step-000000.json").read_text())["values"]
        assert found.keys() == one.keys()
        for name in one:
            assert found[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (kind, name)


def test_ragged_groups_are_as_many_passes_on_every_rank(folder, cpu, tmp_path, monkeypatch):
    """Seven prompts in batches of two over three ranks of fsdp: the last batch is one video's, two ranks have
    no second batch, and a batch bigger than a pass takes several."""
    monkeypatch.setattr(validation, "GROUP_LATENTS", 64)
    sample = validation.flow.sample
    monkeypatch.setattr(validation.flow, "sample", lambda *args, **how: sample(*args, batch_size=1, **how))
    monkeypatch.setattr(parallel, "shard", lambda model, runtime, flags: model)
    shards, calls = data.Shards(folder / "data"), []
    for rank in range(3):
        _, argv = command(folder, "prfl", str(tmp_path / "run"), *WATCH, "--parallel", "fsdp")
        config = common.parse(train_align.Config, "", argv)
        config.shift, config.guidance_scale = 1.0, 1.0
        policy = load_transformer(folder / "generator")
        policy.calls = 0
        policy.register_forward_hook(lambda module, given, out: setattr(module, "calls", module.calls + 1))
        runtime = Runtime(rank, 3, torch.device("cpu"), torch.float32)
        validation.make_validation(config, runtime, policy, shards, torch.arange(7))(policy, 0)
        calls.append(policy.calls)
    assert calls == [2 * 2 * 4 + 2 * 4] * 3             # two groups of two passes of four steps; the SFT loss


def test_logits_by_t_are_as_many_passes_on_every_rank():
    calls = []

    def reward(x, t, context):
        calls.append(len(x))
        return x.mean((1, 2, 3, 4)) + t

    x = torch.randn(5, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    context = torch.zeros(5, 3, 8)
    found = validation.logits_by_t(reward, x[:2], context[:2], batch_size=2, max_rows=5)
    assert calls == [2] * 15                            # three batches in each fifth of t
    assert torch.equal(found, validation.logits_by_t(reward, x[:2], context[:2], batch_size=2))


def test_patience_stops_and_a_resumed_run_remembers(folder, second):
    """With a learning rate that changes nothing, no validation gains: the first one after step 0 is the
    last."""
    flags = [*WATCH, "--judge", str(second), "--learning_rate", "1e-30", "--max_train_steps", "40"]
    run(*command(folder, "sft", "patient", *flags, "--patience", "2", "--checkpointing_steps", "1"))
    rows = metrics(folder, "patient")
    assert rows[-1]["step"] == 4 and rows[-1]["validation_since_best"] == 2
    assert (folder / "patient/checkpoint-000004").is_dir() and not (folder / "patient/best").exists()
    run(*command(folder, "sft", "patient", *flags, "--patience", "3", "--resume", "latest"))
    rows = metrics(folder, "patient")
    assert rows[-1]["step"] == 6 and rows[-1]["validation_since_best"] == 3


def test_lora_checkpoints_may_hold_adapters_alone(folder, second):
    flags = [*WATCH, "--judge", str(second), "--lora_rank", "2", "--learning_rate", "1e-2"]
    run(*command(folder, "prfl", "whole", *flags))
    run(*command(folder, "prfl", "adapters", *flags, "--export", "lora"))
    files = sorted(path.relative_to(folder / "adapters")
                   for path in (folder / "adapters").rglob("*.safetensors"))
    assert {path.name for path in files} == {"pytorch_lora_weights.safetensors"}
    assert {str(path.parent) for path in files} == {".", "best", "checkpoint-000004",
                                                    f"checkpoint-{STEPS:06d}"}
    for where in (".", "best", "checkpoint-000004"):
        name = "pytorch_lora_weights.safetensors"
        one, other = folder / "adapters" / where / name, folder / "whole" / where / name
        assert one.read_bytes() == other.read_bytes()
    run(*command(folder, "prfl", "adapters", *flags, "--export", "lora", "--resume",
                 str(folder / "adapters/checkpoint-000004")))
    assert (folder / "adapters" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert weights(folder, "prfl", "whole")


def test_damaged_notes_of_earlier_validations_count_for_nothing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": 1, "validation_score": {score}}}\n'
                                                    for score in
                                                    ("null", '"x"', "[1]", "0.25", "{}")) + '{"step": 2}\n')
    assert validation.past_scores(tmp_path) == [0.25]
    for text in ("", "{", "[" * 100_000, '{"values": 3}', '{"values": {"speed": "x"}}'):
        (tmp_path / "step-000000.json").write_text(text)
        validation.show(2, {"validation_speed": 0.5}, {"speed": [0.25, 0.75]}, tmp_path)
        assert capsys.readouterr().out.splitlines()[-1].split() == ["speed", "0.5000", "0.5000"]
    (tmp_path / "step-000000.json").write_text('{"values": {"speed": [1, 2]}}')
    validation.show(2, {"validation_speed": 0.5}, {"speed": [0.25, 0.75]}, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["speed", "0.5000", "1.5000", "0.5000"]


def test_what_is_watched_needs_something_to_watch(folder, capsys):
    """A fifth of four clips is none."""
    g = torch.Generator().manual_seed(0)
    data.write_shards(folder / "four", torch.randn(4, 16, 2, 4, 4, generator=g),
                      torch.randn(4, 3, 8, generator=g), 4 * [1], "abcd")
    for flags in ("--judge x", "--validation_steps 7", "--guidance_scale 2", "--patience 2 --judge x"):
        with pytest.raises(SystemExit):
            script, argv = command(folder, "sft", "four-run", "--data", str(folder / "four"), *flags.split())
            run(script, [x for i, x in enumerate(argv) if "--num_validation" not in (x, argv[i - 1])])
        flag = flags.split()[-2]
        assert f"{flag} means nothing without validation" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (["--judge", "{}/generator/reward", "--num_validation", "4"],
     "is the reward model that the generator is trained against"),
    (["--num_validation", "16"], "leaves nothing to train on"),
    (["--patience", "2", "--num_validation", "4"], "--judge"),
    (["--judge", "nowhere", "--num_validation", "4"], "nowhere"), (["--judge", "x"], "--num_validation 0"),
    (["--export", "lora"], "--lora_rank"), (["--lora", "none.safetensors"], "none.safetensors"),
    (["--num_validation", "4", "--validation_prompts", "none.txt"], "none.txt")])
def test_flags_that_cannot_work(folder, capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        run(*command(folder, "prfl", "refused", *(flag.format(folder) for flag in flags)))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ") and words in line
    assert not (folder / "refused/checkpoint-000002").exists()


def test_validation_of_the_world_is_the_annotators(tmp_path):
    """Means over the same fixed samples whatever the ranks; no own data, no judge: the annotator's rate
    chooses."""
    from formats.weights import SHIPPED
    from train_align import Config
    config = Config(model=str(SHIPPED["t2v"]), output_dir=str(tmp_path), num_validation=40,
                    num_inference_steps=4, shift=1.0,
                    guidance_scale=1.0)
    policy = load_transformer(SHIPPED["t2v"])
    found = validation.make_validation(config, Runtime(0, 1, torch.device("cpu"), torch.float32),
                                       policy)(policy, 0)
    assert found["validation_score"] == found["validation_qualified"]
    assert 0 < found["validation_adherent"] <= 1
    assert len(list((tmp_path / "samples/step-000000").glob("*.mp4"))) == validation.SHOWN == 8
    assert Path(tmp_path / "samples/step-000000.png").exists()
