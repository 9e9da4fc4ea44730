"""evaluate.py on prompts of one's own and on clips that exist."""
import json
import shutil
import weakref
from pathlib import Path

import launch
import numpy as np
import pytest
import torch
from tiny import DRIVER

import common
import data
import evaluate
import sample
import validation
from experts import NAMES, Experts
from formats import metadata
from formats.video import read_video
from formats.weights import SHIPPED
from model import export_transformer, load_transformer
from pavrm import load_pavrm
from world import clips

BASE = str(SHIPPED["t2v"])


def run(*argv):
    common.cli(evaluate.main, evaluate.Config, evaluate.__doc__, [str(a) for a in argv])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run(*argv)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("error: ")
    return line


def test_prompts_of_ones_own(tmp_path, capsys):
    """No word of the annotator; the same checkpoint twice differs by nothing; folders as label.py --pairs
    takes them."""
    (tmp_path / "p.txt").write_text("a red circle moving up\na blue square moving down\na big cat\n")
    run("--prompts", tmp_path / "p.txt", f"a={BASE}", f"b={BASE}", "--num_inference_steps", 4, "--reward",
        f"{BASE}/reward",
        "--judge", f"{BASE}/reward", "--output_dir", tmp_path / "out", "--mixed_precision", "no")
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert set(table["rows"]["a"]) == {"pavrm", "judge", "dynamic", *validation.PANEL}
    assert all(cell["mean"] == 0 and cell["interval"] == [0, 0]
               for cell in table["against_first"]["b"].values())
    assert "qualified" not in (tmp_path / "out/table.md").read_text()
    values = json.loads((tmp_path / "out/per_video.json").read_text())
    for name in "ab":
        rows = metadata.read_metadata(tmp_path / "out" / name)
        assert [row["prompt"] for row in rows] == ["a red circle moving up", "a blue square moving down",
                                                   "a big cat"]
        films = torch.stack([read_video(tmp_path / "out" / name / row["file_name"]) for row in rows])
        found = validation.panel(films)["brightness"]           # after a codec
        assert values[name]["brightness"] == pytest.approx(found.tolist(), abs=0.01)
    assert table["rows"]["a"]["brightness"]["mean"] == pytest.approx(np.mean(values["a"]["brightness"]),
                                                                     abs=1e-4)
    assert read_video(tmp_path / "out/side_by_side.mp4").shape[0] == 9
    assert "label.py --pairs" in capsys.readouterr().out
    made, again = tmp_path / "out/b", tmp_path / "again"        # sample.py makes its videos again
    lines = (made / "metadata.jsonl").read_text().splitlines()
    (made / "some.jsonl").write_text(f"{lines[2]}\n{lines[0]}\n")
    flags = ["--prompts", str(made / "some.jsonl"), "--output_dir", str(again)]
    common.cli(sample.main, sample.Config, "", flags)
    assert (again / "000000.mp4").read_bytes() == (made / "000002.mp4").read_bytes()
    assert (again / "000001.mp4").read_bytes() == (made / "000000.mp4").read_bytes()
    assert "note: " not in capsys.readouterr().out


def test_clips_are_scored_worst_first(tmp_path, capsys):
    """Of the embedded world, whose labels are known: the shipped reward model is better than chance, and says
    so itself."""
    clips.main(clips.Config(str(tmp_path / "clips"), count=96, seed=40, kind="mixture"))
    run("--clips", tmp_path / "clips", "--reward", f"{BASE}/reward", "--output_dir", tmp_path / "out",
        "--mixed_precision", "no")
    rows = [json.loads(line) for line in (tmp_path / "out/scores.jsonl").read_text().splitlines()]
    assert len(rows) == 96 and [row["good"] for row in rows] == sorted(row["good"] for row in rows)
    labels = {row["file_name"]: row["label"] for row in metadata.read_metadata(tmp_path / "clips")}
    assert {row["file_name"]: row["label"] for row in rows} == labels
    good, bad = ([row["good"] for row in rows if row["label"] == label] for label in (1, 0))
    assert np.mean(good) > np.mean(bad) + 0.1
    assert "balanced_accuracy" in capsys.readouterr().out
    bins = json.loads((tmp_path / "out/calibration.json").read_text())["(0.4, 0.6]"]
    assert sum(x["count"] for x in bins) == sum(label is not None for label in labels.values())
    shards = data.Shards(tmp_path / "out/latents")              # one clip by hand
    i = next(i for i, row in enumerate(shards.rows) if row["file_name"] == rows[0]["file_name"])
    batch, pavrm = shards.batch([i]), load_pavrm(f"{BASE}/reward")
    t = (4 + common.uniform(0, "interval t", 4, [i])) / 5
    x1 = common.noise(shards.latent_shape, 0, "interval noise", 4, [i])
    with torch.no_grad():
        wanted = torch.sigmoid(pavrm((1 - t) * batch["latents"] + t * x1, t, batch["context"])).item()
    assert rows[0]["good_by_t"][4] == pytest.approx(wanted, abs=2e-4)
    run("--clips", tmp_path / "out/latents", "--reward", f"{BASE}/reward", "--output_dir", tmp_path / "again",
        "--mixed_precision",
        "no")
    assert (tmp_path / "again/scores.jsonl").read_text() == (tmp_path / "out/scores.jsonl").read_text()


def results(folder):
    """{path: content} of what an evaluation wrote, except for what names its own folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        wanted = path.suffix in (".md", ".json", ".jsonl", ".png", ".mp4", ".gif")
        if path.is_file() and wanted and "latents" not in path.parts:
            content = path.read_bytes()
            if path.name == "table.json":
                content = json.dumps(json.loads(content)["rows"])
            found[str(path.relative_to(folder))] = content
    return found


def test_two_ranks_write_what_one_writes(tmp_path, monkeypatch):
    """All three kinds, with ragged groups: the world's, own prompts, clips that are encoded first."""
    driver = DRIVER.replace("import json, sys", "import json, sys, evaluate")
    driver = driver.replace("leave, ", "evaluate.WORLD_BATCH, evaluate.BATCH_LATENTS = 2, 100\nleave, ")
    monkeypatch.setattr(evaluate, "WORLD_BATCH", 2)
    monkeypatch.setattr(evaluate, "BATCH_LATENTS", 100)
    (tmp_path / "p.txt").write_text("a red circle moving up\na blue square moving down\na big cat\n")
    clips.main(clips.Config(str(tmp_path / "clips"), count=5, seed=40, kind="mixture"))
    reward, steps = ["--reward", f"{BASE}/reward", "--mixed_precision", "no"], ["--num_inference_steps", "2"]
    kinds = {"world": [f"base={BASE}", "--num_videos", "5", "--best_of", "2", *steps, *reward],
             "prompts": [f"a={BASE}", "--prompts", str(tmp_path / "p.txt"), *steps, *reward],
             "clips": ["--clips", str(tmp_path / "clips"), *reward]}
    jobs = [("evaluate", [*flags, "--output_dir", str(tmp_path / "two" / kind)]) for kind,
            flags in kinds.items()]
    launch.torchrun(2, "-c", driver, json.dumps(jobs))
    for kind, flags in kinds.items():
        run(*flags, "--output_dir", tmp_path / "one" / kind)
        one, two = results(tmp_path / "one" / kind), results(tmp_path / "two" / kind)
        assert one == two and len(one) >= 1, kind
    table = (tmp_path / "one/prompts/table.md").read_text()
    assert "| a |" in table and "above" not in table            # a generator alone is compared with nothing


@pytest.mark.parametrize("experts", [1, 2])
def test_two_ranks_that_share_the_weights_make_the_same_videos(tmp_path, monkeypatch, experts):
    """Three groups for two ranks: one has a spare turn, of which nothing is kept. Resampling makes equally
    many passes in groups of two and of one."""
    driver = DRIVER.replace("import json, sys", "import json, sys, evaluate")
    driver = driver.replace("leave, ", "evaluate.BATCH_LATENTS = 100\nleave, ")
    monkeypatch.setattr(evaluate, "BATCH_LATENTS", 100)
    (tmp_path / "p.txt").write_text("".join(f"a {color} circle moving up\n" for color in
                                            ("red", "blue", "green", "big", "small")))
    model, reward = BASE, f"{BASE}/reward"
    if experts == 2:
        model, low = str(tmp_path / "two"), load_transformer(BASE)
        shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("transformer"))
        both = Experts(load_transformer(BASE), low, 0.6)
        both.high.head.modulation.data += 0.1
        for name, folder in (("high", "transformer"), ("low", "transformer_2")):
            export_transformer(getattr(both, name), f"{model}/{folder}", notes=both.notes(name, NAMES))
    flags = ["--model", model, f"a={model}", f"b={model}", "--prompts", str(tmp_path / "p.txt"),
             "--num_inference_steps", "4", "--best_of", "2", "--reward", reward, "--judge", reward,
             "--mixed_precision", "no"]
    job = ("evaluate", [*flags, "--output_dir", str(tmp_path / "shared"), "--parallel", "fsdp"])
    launch.torchrun(2, "-c", driver, json.dumps([job]))
    run(*flags, "--output_dir", tmp_path / "one")
    one, shared = results(tmp_path / "one"), results(tmp_path / "shared")
    assert one == shared and sum(name.endswith(".mp4") for name in one) == 11
    assert json.loads((tmp_path / "shared/table.json").read_text())["config"]["parallel"] == "fsdp"


def test_a_generator_leaves_before_the_next_one_comes():
    seen, runtime = [], common.Runtime(0, 1, torch.device("cpu"), torch.float32)

    def open_source(name):
        assert all(generator() is None for generator in seen)
        generator = torch.nn.Linear(1, 1)
        seen.append(weakref.ref(generator))
        return [[0]], lambda group, keep: ({"x": generator.weight[0]}, torch.zeros(1, 5, 8, 8, 3).byte())

    with torch.no_grad():
        found, films = evaluate.measure_all(["a", "b"], open_source, runtime, "ddp")
    assert len(seen) == 2 and list(found) == list(films) == ["a", "b"]


def test_calibration_by_hand():
    good = torch.tensor([[0.05, 0.06, 0.92, 0.96, 1.0]]).expand(5, 5)
    bins = evaluate.calibration(good, torch.tensor([0, 1, 1, 1, 0]))["(0.0, 0.2]"]
    assert [x["count"] for x in bins] == [2, 3]
    assert bins[0]["predicted"] == pytest.approx(0.055) and bins[0]["good"] == 0.5
    assert bins[1]["predicted"] == pytest.approx(0.96) and bins[1]["good"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("flags, words", [
    (("--prompts", "p.txt"), "give checkpoints"), (("--clips", "x"), "--reward"),
    (("--clips", "x", "--reward", "y", "base=z"), "no checkpoints"),
    (("--clips", "nowhere", "--reward", f"{BASE}/reward"), "nowhere"),
    ((BASE, "--judge", f"{BASE}/reward"), "--judge"),
    ((BASE, "--size", "64*64"), "--size means nothing"), ((BASE, "--prompts", "none.txt"), "none.txt"),
    ((BASE, "--prompts", "p.txt", "--reward", "nowhere"), "nowhere"),
    ((BASE, "--prompts", "p.txt", "--split", "test"), "--split means nothing"),
    ((BASE, "--prompts", "p.txt", "--parallel", "fsdp"), "--parallel fsdp shards over processes"),
    ((BASE, "--parallel", "fsdp"), "--parallel means nothing without --prompts: leave it out"),
    (("--clips", "x", "--reward", "y", "--parallel", "fsdp"),
     "--parallel means nothing without --prompts: leave it out")])
def test_flags_that_cannot_work(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red circle")
    assert words in refused(capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
