"""sample.py with many prompts: split over processes, killed and resumed, its files, its refusals; and files
of prompts."""
import json
import shutil
import signal
import time
from pathlib import Path

import launch
import pytest
import torch
from safetensors.torch import save_file
from tiny import DRIVER

import common
import sample
from common import InputError
from formats import encoders, lock, metadata, samples
from formats.prompts import read_prompts
from formats.video import read_video, write_png
from formats.weights import SHIPPED, WEIGHTS
from model import PRESETS
from pavrm import PAVRM
from scale import parallel
from world import annotator

FAST = ["--num_inference_steps", "2", "--batch_size", "2"]
PROMPTS = [f"a {color} {shape} moving {way}" for color, shape, way in
           (("red", "circle", "up"), ("blue", "square", "down"), ("green", "circle", "left"),
            ("yellow", "triangle", "right"),
            ("red", "square", "left"), ("blue", "circle", "up"), ("green", "square", "down"))]


def run(*argv):
    common.cli(sample.main, sample.Config, sample.__doc__, [str(a) for a in argv])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """prompts.txt with seven prompts, and their videos made by one process in one go."""
    folder = tmp_path_factory.mktemp("sampled")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    run("--prompts", folder / "prompts.txt", "--output_dir", folder / "one", *FAST)
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != lock.NAME}


def test_many_prompts_are_mp4s_and_metadata(made, tmp_path):
    rows = metadata.read_metadata(made / "one")
    assert [row["prompt"] for row in rows] == PROMPTS and {row["label"] for row in rows} == {None}
    films = torch.stack([read_video(made / "one" / row["file_name"]) for row in rows])
    assert films.shape == (7, 9, 32, 32, 3)
    (tmp_path / "more.txt").write_text("\n".join(PROMPTS[:2]))
    run("--prompts", tmp_path / "more.txt", "--output_dir", tmp_path / "more", "--num_videos", 12,
        "--num_inference_steps", 16)
    rows = [json.loads(line) for line in (tmp_path / "more/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows[11:13]] == ["000000-11.mp4", "000001-0.mp4"]
    films = torch.stack([read_video(tmp_path / "more" / row["file_name"]) for row in rows])
    assert annotator.annotate(films, [row["prompt"] for row in rows])["adherent"].float().mean() > 0.5


def test_three_processes_make_the_same_files(made, tmp_path):
    """Whole and in pieces, seven prompts in ragged batches; a search, whose ranks make equally many passes; a
    list that is made again."""
    driver = DRIVER.replace("import json, sys", "import json, sys, sample")
    search = ["--best_of", "4", "--prompts", str(made / "prompts.txt"), *FAST]
    again = ["--prompts", str(made / "one/metadata.jsonl")]
    runs = [("sample", ["--prompts", str(made / "prompts.txt"), *FAST]), ("sample", search),
            ("sample", again)]
    folders = [("ddp", 0), ("fsdp", 0), ("fsdp", 1), ("fsdp", 2)]
    runs = [(script, [*flags, "--output_dir", str(tmp_path / f"{kind}-{i}"), "--parallel", kind])
            for kind, i in folders for script, flags in runs[i:i + 1]]
    launch.torchrun(3, "-c", driver, json.dumps(runs))
    assert files(tmp_path / "ddp-0") == files(tmp_path / "fsdp-0") == files(made / "one")
    assert films(tmp_path / "fsdp-2") == films(made / "one")
    run(*search, "--output_dir", tmp_path / "one")
    assert files(tmp_path / "fsdp-1") == files(tmp_path / "one")
    assert films(tmp_path / "one") != films(made / "one")


@pytest.mark.parametrize("kind, shares", [("ddp", [[0, 2], [1]]), ("fsdp", [[0, 2], [1, 0]])])
def test_the_share_of_a_rank(kind, shares):
    """Three items for two ranks, and none for both: all was done before."""
    for rank, share in enumerate(shares):
        runtime = common.Runtime(rank, 2, torch.device("cpu"), torch.float32)
        found = parallel.work_of_rank([0, 1, 2], runtime, kind)
        assert [item for item, _ in found] == share
        assert [item for item, keep in found if keep] == [0, 1, 2][rank::2]
        assert parallel.work_of_rank([], runtime, kind) == []


# ---- rows that make their videos again
def films(folder):
    return {name: content for name, content in files(folder).items() if name.endswith(".mp4")}


def latents_of(monkeypatch, *argv):
    """Runs sample.py -> latents [n, c, f, h, w] of all videos that it decoded, in order: mp4 hides small
    differences."""
    found, decode = [], encoders.decode_pixels
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "decode_pixels", lambda vae, x: found.append(x.clone()) or decode(vae, x))
        run(*argv)
    return torch.cat(found)


def pick(folder, name, places):
    """A list in `folder` of some rows of its metadata.jsonl -> (its path, the names of their files)"""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines = [lines[place] for place in places]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name, [json.loads(line)["file_name"] for line in lines]


SETTINGS = ["--num_inference_steps", 3, "--guidance_scale", 2, "--shift", 2, "--fps", 5, "--seed", 3]


def test_a_row_makes_its_video_again(tmp_path, monkeypatch):
    """The second video of a prompt, rows picked out and in another order, another batch size: the same
    latents to the last bit, as alone in its batch a video has others; and the same bytes."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:3]))
    first = latents_of(monkeypatch, "--prompts", tmp_path / "p.txt", "--output_dir", tmp_path / "a",
                       "--num_videos", 2,
                       "--batch_size", 4, *SETTINGS)                        # batches of four and of two
    alone = latents_of(monkeypatch, "--prompts", tmp_path / "p.txt", "--output_dir", tmp_path / "alone",
                       "--num_videos", 2, "--batch_size", 1, *SETTINGS)
    assert not torch.equal(alone, first)
    again = latents_of(monkeypatch, "--prompts", tmp_path / "a/metadata.jsonl", "--output_dir",
                       tmp_path / "b")
    assert torch.equal(again, first)
    assert sorted(films(tmp_path / "b").values()) == sorted(films(tmp_path / "a").values())
    path, names = pick(tmp_path / "a", "picked.jsonl", [5, 3, 1])
    some = latents_of(monkeypatch, "--prompts", path, "--output_dir", tmp_path / "c", "--batch_size", 3)
    # each at its place, in the batch of two, then in that of four
    assert torch.equal(some[[1, 5, 3]], first[[5, 3, 1]])
    for i, name in enumerate(names):
        assert (tmp_path / f"c/{i:06d}.mp4").read_bytes() == (tmp_path / "a" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "c/metadata.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in path.read_text().splitlines()]
    # so the new list makes them again, too
    assert [row["settings"] for row in rows] == [row["settings"] for row in before]


def test_a_search_is_made_again(tmp_path):
    """Best of 4 with drops of its own and a reward model, from a prompt that stood in the middle."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS[:3]))
    run("--prompts", tmp_path / "p.txt", "--output_dir", tmp_path / "a", *FAST, "--best_of", 4,
        "--search", "drop", "--drops", ".5:2", "--reward", SHIPPED["t2v"] / "reward")
    path, (name,) = pick(tmp_path / "a", "one.jsonl", [1])
    run("--prompts", path, "--output_dir", tmp_path / "b")
    assert (tmp_path / "b/000000.mp4").read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_first_frames_are_found_from_the_list(tmp_path, monkeypatch):
    """Images beside the prompts, an output folder behind a link, another working directory."""
    (tmp_path / "work/images").mkdir(parents=True)
    (tmp_path / "disk/deep").mkdir(parents=True)
    (tmp_path / "work/out").symlink_to(tmp_path / "disk/deep")
    g = torch.Generator().manual_seed(0)
    for i in range(2):
        write_png(tmp_path / f"work/images/{i}.png",
                  torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=g))
    rows = [{"prompt": PROMPTS[i], "image": f"images/{i % 2}.png"} for i in range(3)]
    (tmp_path / "work/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path / "work")
    first = latents_of(monkeypatch, "--task", "i2v", "--prompts", "p.jsonl", "--output_dir", "out/a",
                       "--batch_size", 3,
                       "--num_inference_steps", 2)
    monkeypatch.chdir(tmp_path)
    path, names = pick(tmp_path / "work/out/a", "some.jsonl", [1, 0])
    again = latents_of(monkeypatch, "--prompts", path, "--output_dir", "b")
    assert torch.equal(again[:2], first[:2])
    for i, name in enumerate(names):
        assert (tmp_path / f"b/{i:06d}.mp4").read_bytes() == (tmp_path / "work/out/a" / name).read_bytes()
    run("--prompts", tmp_path / "b/metadata.jsonl", "--output_dir", tmp_path / "c")         # a list of a list
    assert films(tmp_path / "c") == films(tmp_path / "b")


def recorded(**changes):
    """The settings of a row, as sample.py writes them for the shipped generator."""
    flags = dict(model=str(SHIPPED["t2v"]), size="32*32", frames=9, fps=8.0, num_inference_steps=2,
                 guidance_scale=2.0,
                 shift=1.0, batch_size=4, mixed_precision="no", best_of=1)
    return samples.describe(flags, "/") | {"index": 5, "batch": 4, "place": 2} | changes


def taken(monkeypatch, flags, **changes):
    """-> (config with the settings of one row beside these flags, its video, whether all settings hold)"""
    config = sample.Config(prompts="folder/list.jsonl", output_dir="out", **flags)
    given = [{"prompt": "a", "image": None, "seed": 7, "settings": recorded(**changes)}]
    monkeypatch.setattr(sample, "read_prompts", lambda path: given)
    videos, before = sample.list_videos(config)
    return config, videos[0], before is not None


def test_flags_beside_the_list_replace_what_its_rows_say(monkeypatch, capsys):
    config, video, exact = taken(monkeypatch, {}, lora="l.safetensors", transformer="runs/a")
    assert (config.guidance_scale, config.fps, config.batch_size) == (2, 8, 4)
    assert (config.task, config.model) == ("t2v", None)
    assert (config.lora, config.transformer) == ("folder/l.safetensors", "folder/runs/a")
    assert (video.seed, video.index, video.batch, video.place, exact) == (7, 5, 4, 2, True)
    assert capsys.readouterr().out == ""
    config, video, exact = taken(monkeypatch, {"guidance_scale": 3.0, "batch_size": 2})
    assert (config.guidance_scale, config.num_inference_steps, config.batch_size) == (3, 2, 2)
    assert (video.seed, video.index, video.batch, exact) == (7, 5, None, False)
    assert "made with other guidance_scale, batch_size: these are new videos" in capsys.readouterr().out
    config, video, exact = taken(monkeypatch, {"batch_size": 2, "guidance_scale": 2.0})
    assert (config.batch_size, video.batch, exact) == (4, 4, True)
    assert "--batch_size is not used" in capsys.readouterr().out
    config, *_ = taken(monkeypatch, {"transformer": "mine"}, lora="l.safetensors", transformer="runs/a")
    assert (config.transformer, config.lora, config.task) == ("mine", None, "t2v")
    config, *_, exact = taken(monkeypatch, {"transformer": "folder/../folder/runs/a"}, transformer="runs/a")
    assert exact
    config, *_ = taken(monkeypatch, {"model": "Wan"}, transformer="runs/a", reward="r", best_of=4)
    assert (config.model, config.transformer, config.reward) == ("Wan", None, None)
    assert (config.task, config.best_of) == (None, 4)
    config, *_ = taken(monkeypatch, {"best_of": 2, "guidance_scale": 1.0}, best_of=8, drops=".5:4",
                       negative_prompt="dull")
    assert (config.search, config.drops, config.negative_prompt) == ("drop", None, None)
    config, video, exact = taken(monkeypatch, {"num_videos": 2})
    assert (video.seed, video.index, video.batch, exact) == (7, 0, None, False)


@pytest.mark.parametrize("settings, words", [
    ({"steps": 3}, "'steps', which sample.py does not know"), ({"place": 4}, "do not fit together"),
    ({"index": "5"}, "whole numbers"), ({"batch": 9, "place": 8}, "do not fit"),
    ({"place": -1}, "do not fit"),
    ({"guidance_scale": "much"}, "--guidance_scale: invalid float value"),
    ({"frames": 2}, "--frames must be"),
    ({"mixed_precision": "fp8"}, "fp8"), ({"drops": ".5:9", "best_of": 4}, "--drops"),
    ({"search": "resample", "best_of": 4, "drops": ".5:1"}, "--drops means nothing"),
    ({"index": True}, "whole numbers"),
    ({"negative_prompt": "\ud83d"}, "negative_prompt that is not text"),
    ({"lora": "a\0b"}, "lora that is not text")])
def test_settings_that_cannot_be_used(monkeypatch, settings, words):
    with pytest.raises(InputError) as error:
        taken(monkeypatch, {}, **settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_lists_whose_rows_contradict_each_other(tmp_path):
    rows = [{"settings": recorded()}, {}, {"settings": recorded(index=6, place=3)}]
    assert samples.shared_settings("x.jsonl", rows)["guidance_scale"] == 2
    with pytest.raises(InputError, match="settings of prompt 4 have another shift than those of prompt 1"):
        samples.shared_settings("x.jsonl", [*rows, {"settings": recorded(shift=3.0)}])
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "settings": "fast"}\n')
    with pytest.raises(InputError, match="row 1: settings must be an object"):
        read_prompts(tmp_path / "x.jsonl")


def test_what_is_recorded():
    """What cannot be given back as a flag is left out; the shipped generator is known by its task, others by
    path."""
    flags = dict(model=str(SHIPPED["t2v"]), guidance_scale=1.0, negative_prompt="dull",
                 transformer=str(SHIPPED["t2v"]))
    assert samples.describe(flags, "/a").keys() == {"guidance_scale", "weights", "task"}
    flags |= {"transformer": str(SHIPPED["i2v"] / "transformer"), "guidance_scale": 2.0, "task": "t2v"}
    found = samples.describe(flags, SHIPPED["t2v"] / "reward")
    assert found["negative_prompt"] == "dull" and found["transformer"] == "../i2v/transformer"
    flags["model"] = str(SHIPPED["t2v mid"])
    found = samples.describe(flags, SHIPPED["t2v"] / "reward")
    assert found["model"] == "../mid" and "task" not in found


def test_places_in_batches():
    """Rows keep their place, in any order; who has none goes with its neighbours of one seed."""
    def video(name, seed=0, batch=None, place=None):
        return sample.Video(Path(name), "a", None, seed, 0, batch, place)

    def names(videos):
        return [[str(one.path or "-") for one in batch] for batch in sample.batches(videos)]

    videos = [video(name, seed) for name, seed in zip("abcdefg", (0, 0, 0, 1, 0, 0, 2))]
    sample.place_videos(videos, 2)
    assert names(videos) == [["a", "b"], ["c"], ["d"], ["e", "f"], ["g"]]
    assert names([videos[1], videos[3], videos[0]]) == [["a", "b"], ["d"]]
    assert names([videos[1], videos[5], videos[2]]) == [["-", "b"], ["-", "f"], ["c"]]
    mixed = [video("x", 0, 3, 1), video("y"), video("z", 0, 3, 1), video("w", 0, 3, 0), video("v", 1, 3, 2)]
    sample.place_videos(mixed, 2)
    assert names(mixed) == [["w", "x", "-"], ["y"], ["-", "z", "-"], ["-", "-", "v"]]
    filled = sample.batches(mixed)[0]
    assert (filled[2].seed, filled[2].batch) == (0, 3) and sample.is_done(filled) is False


def test_weights_are_known_by_content(tmp_path, monkeypatch, capsys):
    """Another transformer under the same name is told; the same one elsewhere is not."""
    flags = dict(model=str(SHIPPED["t2v"]), transformer=str(SHIPPED["t2v"] / "transformer"), best_of=1)
    same = samples.of_weights(flags)
    assert samples.of_weights(flags | {"transformer": None}) == same
    others = [flags | {"transformer": str(SHIPPED["i2v"])}, flags | {"best_of": 2},
              flags | {"model": "model"},
              flags | {"lora": str(SHIPPED["t2v"] / "transformer/config.json")}]
    shutil.copytree(SHIPPED["t2v"] / "text_encoder", tmp_path / "model/text_encoder")       # no VAE
    monkeypatch.chdir(tmp_path)
    assert len({same, *map(samples.of_weights, others)}) == 5
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "seed": 0,
                                                  "settings": recorded(weights="0" * 16)}) + "\n")
    run("--prompts", tmp_path / "x.jsonl", "--output_dir", tmp_path / "out")
    assert "the weights named there have changed since" in capsys.readouterr().out
    run("--prompts", tmp_path / "out/metadata.jsonl", "--output_dir", tmp_path / "again")
    assert "note: " not in capsys.readouterr().out


def test_a_folder_of_before_continues(made, tmp_path):
    """sample.json without the fingerprint of the weights, and with drops under their old name."""
    shutil.copytree(made / "one", tmp_path / "one")
    note = json.loads((tmp_path / "one/sample.json").read_text())
    del note["weights"], note["drops"]
    (tmp_path / "one/sample.json").write_text(json.dumps(note | {"cuts": None}))
    (tmp_path / "one/000006.mp4").unlink()
    run("--prompts", made / "prompts.txt", "--output_dir", tmp_path / "one", *FAST)
    assert films(tmp_path / "one") == films(made / "one")


def test_a_search_of_before_dropped_candidates(tmp_path):
    """A folder whose sample.json does not say how it searched goes on only with --search drop."""
    config = sample.Config(prompts="p.txt", output_dir=str(tmp_path / "out"), best_of=4, search="drop")
    sample.start_folder(config, []).close()
    (tmp_path / "out/000000.mp4").touch()
    path = tmp_path / "out/sample.json"
    note = json.loads(path.read_text())
    assert note.pop("search") == "drop"
    path.write_text(json.dumps(note))
    sample.start_folder(config, []).close()
    config.search = "resample"
    with pytest.raises(common.InputError, match="made with other search: use the same flags"):
        sample.start_folder(config, [])


def test_a_start_that_made_no_video_does_not_bind_the_folder(tmp_path, capsys):
    """The text encoder cannot be loaded, and is replaced: the same command then works."""
    for name in ("transformer", "vae", "text_encoder"):
        shutil.copytree(SHIPPED["t2v"] / name, tmp_path / "model" / name)
    weights = tmp_path / "model/text_encoder" / WEIGHTS
    whole = weights.read_bytes()
    save_file({"x": torch.zeros(1)}, weights)
    (tmp_path / "p.txt").write_text(PROMPTS[0])
    flags = ["--model", tmp_path / "model", "--prompts", tmp_path / "p.txt", "--output_dir", tmp_path / "out"]
    assert "do not fit" in refused(capsys, *flags, *FAST)
    assert (tmp_path / "out/sample.json").is_file()
    weights.write_bytes(whole)
    run(*flags, *FAST)
    assert list(films(tmp_path / "out")) == ["000000.mp4"]


def test_killed_and_resumed_makes_the_same_files(made, tmp_path):
    with launch.Launch("sample.py", "--prompts", made / "prompts.txt", "--output_dir", tmp_path / "cut",
                       *FAST) as process:
        while process.running and not list(tmp_path.glob("cut/*.mp4")):
            time.sleep(0.01)
        process.signal(signal.SIGKILL)
    (tmp_path / "cut/000003.mp4").unlink(missing_ok=True)  # its neighbour in the batch is made again with it
    before = len(list(tmp_path.glob("cut/*.mp4")))
    run("--prompts", made / "prompts.txt", "--output_dir", tmp_path / "cut", *FAST)
    assert before < 7
    left = {name: content for name, content in files(tmp_path / "cut").items() if not name.endswith(".tmp")}
    assert left == files(made / "one")


def test_a_row_may_have_its_own_seed(tmp_path):
    """Then its noise is that seed's alone, wherever the row stands."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": PROMPTS[0], "seed": seed}) + "\n"
                                              for seed in (4, 9)))
    (tmp_path / "b.csv").write_text("Seed, Prompt\n9," + PROMPTS[0] + "\n")
    for name in ("a.jsonl", "b.csv"):
        run("--prompts", tmp_path / name, "--output_dir", tmp_path / name[0], *FAST)
    nine = (tmp_path / "b/000000.mp4").read_bytes()
    assert (tmp_path / "a/000001.mp4").read_bytes() == nine != (tmp_path / "a/000000.mp4").read_bytes()
    run("--prompt", PROMPTS[0], "--seed", 9, "--output", tmp_path / "c.mp4", *FAST)
    assert (tmp_path / "c.mp4").read_bytes() == nine


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        run(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert [line.startswith("error: ") for line in lines].count(True) == 1 and "Traceback" not in str(lines)
    return lines[-1]


def test_another_sampling_is_refused_in_the_folder(made, tmp_path, capsys):
    before = files(made / "one")
    flags = ["--prompts", made / "prompts.txt", "--output_dir", made / "one", *FAST]
    assert "other guidance_scale" in refused(capsys, *flags, "--guidance_scale", 2)
    assert "made with other prompts, seeds or images: use" in refused(capsys, *flags, "--seed", 2)
    (tmp_path / "mine.txt").write_text("text")
    assert "not ours" in refused(capsys, "--prompts", made / "prompts.txt", "--output_dir", tmp_path)
    assert files(made / "one") == before and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flags, words", [
    (("--model", "x"), "give --prompt"), (("--prompt", "a", "--prompts", "p.txt"), "give --prompt"),
    (("--prompts", "p.txt"), "--output_dir"), (("--prompt", "a", "--output_dir", "x"), "--output_dir"),
    (("--prompts", "none.txt", "--output_dir", "x"), "none.txt"),
    (("--prompts", "p.txt", "--output_dir", "x", "--output", "y.mp4"),
                                                                   "--output"),
    (("--prompt", "a", "--size", "30*30"), "--size must be W*H, both multiples of 16, got 30*30"),
    (("--prompt", "a", "--size", "32,32"), "--size must be W*H, such as 832*480, got 32,32"),
    (("--prompt", "a cat --w 832 --h 480"), "--prompt: --w is not read from a prompt: take it out"),
    (("--prompt", "a", "--frames", "10"), "--frames"),
    (("--prompt", "a", "--lora", "none.safetensors"), "none.safetensors"),
    (("--prompt", "a", "--parallel", "fsdp"), "torchrun"),
    (("--prompts", "image.jsonl", "--output_dir", "x"), "this one is t2v")])
def test_flags_that_cannot_work(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a red circle")
    write_png("first.png", torch.zeros(32, 32, 3, dtype=torch.uint8))
    Path("image.jsonl").write_text('{"prompt": "a", "image": "first.png"}')
    before = sorted(tmp_path.iterdir())
    assert words in refused(capsys, *flags)
    assert sorted(tmp_path.iterdir()) == before


def test_prompts_of_every_kind_of_file(tmp_path):
    write_png(tmp_path / "first.png", torch.zeros(16, 16, 3, dtype=torch.uint8))
    (tmp_path / "a.txt").write_text("\ufeffa red  circle\r\n\r\n ein grüner Kreis \n", encoding="utf-8")
    prompts = [row["prompt"] for row in read_prompts(tmp_path / "a.txt")]
    assert prompts == ["a red circle", "ein grüner Kreis"]
    (tmp_path / "b.csv").write_text('Caption ,image,SEED\n"one, two",first.png,3\n\nthree,,\n')
    assert read_prompts(tmp_path / "b.csv") == [
        {"prompt": "one, two", "image": str(tmp_path / "first.png"), "seed": 3},
        {"prompt": "three", "image": None, "seed": None}]


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no prompt"), ("a.txt", b" \n\n", "no prompt"), ("a.txt", b"\xff\xfe", "UTF-8"),
    ("a.csv", b"prompt\n", "no prompt"),
    ("a.jsonl", b'["x"]', "row 1: the file is one JSON document"),
    ("a.jsonl", b'{"prompt": "x"}\n{', "row 2: not a JSON object"),
    ("a.jsonl", b'{"prompt": ["x"]}', "must be text"), ("a.jsonl", b'{"prompt": 3}', "must be text"),
    ("a.jsonl", b'{"prompts": "x"}', "is empty"), ("a.jsonl", b'{"prompt": "x \\ud83d"}', "not UTF-8"),
    ("a.jsonl", b'{"prompt": "x", "image": "no.png"}', "no image"),
    ("a.jsonl", b'{"prompt": "x", "seed": -1}', "seed"),
    ("a.csv", b"prompt\na, b\n", "2 fields"), ("a.csv", b'prompt\n"a\nb\n', "a.csv"),
    ("a.json", b"{}", ".jsonl")])
def test_files_of_prompts_that_are_none(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_what_does_not_fit_is_told_before():
    """Wan2.1 14B at 480P fits one GPU of 80 GB; 1.3B fits, and 14B does not fit, 24 GB."""
    config = sample.Config("a", size="832*480", frames=81, num_inference_steps=40, batch_size=1)
    one = common.Runtime(0, 1, torch.device("cpu"), torch.bfloat16)
    told = lambda preset, memory: sample.memory_warning(config, PRESETS[preset], one, memory)
    assert told("wan2.1-t2v-14b", 80e9) is None and told("wan2.1-t2v-1.3b", 24e9) is None
    line = told("wan2.1-t2v-14b", 24e9)
    assert line.startswith("likely out of memory: this needs 34 GB of a GPU's 24") and "\n" not in line
    # 29 GB of weights are in bf16, and the decoder comes when they have gone; a reward model lies beside them
    assert told("wan2.1-t2v-14b", 36e9) is None
    with torch.device("meta"):
        pavrm = PAVRM(PRESETS["wan2.1-t2v-14b"] | {"num_layers": 8}).freeze()
    parallel.cast_matrices(pavrm.trunk, torch.bfloat16)
    line = sample.memory_warning(config, PRESETS["wan2.1-t2v-14b"], one, 36e9, pavrm)
    assert "this needs 41 GB of a GPU's 36" in line


def test_what_is_no_text_or_does_nothing_is_refused(tmp_path, capsys):
    rows = '{"prompt": "a circle", "seed": 3}\n{"prompt": "a square", "seed": 0}\n'
    (tmp_path / "p.jsonl").write_text(rows)
    for flags, words in ((["--prompt", "a circle \udcff"],
                          "--prompt holds '\\udcff', which is not UTF-8 text"),
                         (["--prompt", "x", "--negative_prompt", "\udc80", "--guidance_scale", 2],
                          "--negative_prompt holds"),
                         (["--prompts", tmp_path / "p.jsonl", "--output_dir", tmp_path / "out", "--seed", 5],
                          "--seed means nothing where every row of --prompts has its own seed")):
        with pytest.raises(SystemExit) as end:
            run(*flags)
        assert end.value.code == 2 and words in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "image": "n" * 300}) + "\n")
    with pytest.raises(InputError, match="row 1: there is no image"):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_that_are_cut_are_told(tmp_path, capsys):
    for end, told in (("to the left " * 10, True), ("to the left", False), ("\u00e9" * 60, True)):
        run("--prompt", f"a red circle moving {end}", "--output", tmp_path / "a.mp4", "--num_inference_steps",
            1)
        assert ("1 of the prompts are longer than the 128 bytes" in capsys.readouterr().out) == told


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00"])
def test_a_damaged_note_of_how_videos_were_made_is_one_line(tmp_path, text):
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(InputError, match="sample.json is damaged"):
        sample.start_folder(sample.Config("x", output_dir=str(tmp_path)), [])
