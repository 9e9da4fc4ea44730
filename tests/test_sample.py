"""sample.py with many prompts: split over processes, killed and resumed, its files, its refusals; and files of prompts."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import DRIVER, ENV, ROOT

import common
import data
import sample
from common import InputError
from formats import lock
from formats.prompts import read_prompts
from formats.video import read_video, write_png
from model import PRESETS
from world import annotator

FAST = ["--num_inference_steps", "2", "--batch_size", "2"]
PROMPTS = [f"a {color} {shape} moving {way}" for color, shape, way in
           (("red", "circle", "up"), ("blue", "square", "down"), ("green", "circle", "left"), ("yellow", "triangle", "right"),
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
    rows = data.read_metadata(made / "one")
    assert [row["prompt"] for row in rows] == PROMPTS and {row["label"] for row in rows} == {None}
    films = torch.stack([read_video(made / "one" / row["file_name"]) for row in rows])
    assert films.shape == (7, 9, 32, 32, 3)
    (tmp_path / "more.txt").write_text("\n".join(PROMPTS[:2]))
    run("--prompts", tmp_path / "more.txt", "--output_dir", tmp_path / "more", "--num_videos", 12, "--num_inference_steps", 16)
    rows = [json.loads(line) for line in (tmp_path / "more/metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows[11:13]] == ["000000-11.mp4", "000001-0.mp4"]
    films = torch.stack([read_video(tmp_path / "more" / row["file_name"]) for row in rows])
    assert annotator.annotate(films, [row["prompt"] for row in rows])["adherent"].float().mean() > 0.5


def test_three_processes_make_the_same_files(made, tmp_path):
    """Whole and in pieces, seven prompts."""
    driver = DRIVER.replace("import json, sys", "import json, sys, sample")
    runs = [("sample", ["--prompts", str(made / "prompts.txt"), "--output_dir", str(tmp_path / kind), "--parallel", kind, *FAST])
            for kind in ("ddp", "fsdp")]
    (tmp_path / "driver.py").write_text(driver)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
                    tmp_path / "driver.py", json.dumps(runs)], env=ENV, check=True, timeout=300)
    for kind in ("ddp", "fsdp"):
        assert files(tmp_path / kind) == files(made / "one")


def test_killed_and_resumed_makes_the_same_files(made, tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", "--prompts", made / "prompts.txt", "--output_dir",
                                tmp_path / "cut", *FAST], env=ENV, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("cut/*.mp4")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "cut/000003.mp4").unlink(missing_ok=True)           # its neighbour in the batch is made again with it
    before = len(list(tmp_path.glob("cut/*.mp4")))
    run("--prompts", made / "prompts.txt", "--output_dir", tmp_path / "cut", *FAST)
    assert before < 7
    left = {name: content for name, content in files(tmp_path / "cut").items() if not name.endswith(".tmp")}
    assert left == files(made / "one")


def test_a_row_may_have_its_own_seed(tmp_path):
    """Then its noise is that seed's alone, wherever the row stands."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": PROMPTS[0], "seed": seed}) + "\n" for seed in (4, 9)))
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
    assert end.value.code == 2 and [line.startswith("error: ") for line in lines].count(True) == 1 and "Traceback" not in str(lines)
    return lines[-1]


def test_another_sampling_is_refused_in_the_folder(made, tmp_path, capsys):
    before = files(made / "one")
    flags = ["--prompts", made / "prompts.txt", "--output_dir", made / "one", *FAST]
    assert "other guidance_scale" in refused(capsys, *flags, "--guidance_scale", 2)
    assert "other videos" in refused(capsys, *flags, "--seed", 2)
    (tmp_path / "mine.txt").write_text("text")
    assert "not ours" in refused(capsys, "--prompts", made / "prompts.txt", "--output_dir", tmp_path)
    assert files(made / "one") == before and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("flags, words", [
    (("--model", "x"), "give --prompt"), (("--prompt", "a", "--prompts", "p.txt"), "give --prompt"),
    (("--prompts", "p.txt"), "--output_dir"), (("--prompt", "a", "--output_dir", "x"), "--output_dir"),
    (("--prompts", "none.txt", "--output_dir", "x"), "none.txt"), (("--prompts", "p.txt", "--output_dir", "x", "--output", "y.mp4"),
                                                                   "--output"),
    (("--prompt", "a", "--size", "30*30"), "--size"), (("--prompt", "a", "--frames", "10"), "--frames"),
    (("--prompt", "a", "--lora", "none.safetensors"), "none.safetensors"), (("--prompt", "a", "--parallel", "fsdp"), "torchrun"),
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
    assert [row["prompt"] for row in read_prompts(tmp_path / "a.txt")] == ["a red circle", "ein grüner Kreis"]
    (tmp_path / "b.csv").write_text('Caption ,image,SEED\n"one, two",first.png,3\n\nthree,,\n')
    assert read_prompts(tmp_path / "b.csv") == [
        {"prompt": "one, two", "image": str(tmp_path / "first.png"), "seed": 3}, {"prompt": "three", "image": None, "seed": None}]


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "no prompt"), ("a.txt", b" \n\n", "no prompt"), ("a.txt", b"\xff\xfe", "UTF-8"),
    ("a.csv", b"prompt\n", "no prompt"),
    ("a.jsonl", b'["x"]', "row 1: the file is one JSON document"), ("a.jsonl", b'{"prompt": "x"}\n{', "row 2: not a JSON object"),
    ("a.jsonl", b'{"prompt": ["x"]}', "must be text"), ("a.jsonl", b'{"prompt": 3}', "must be text"),
    ("a.jsonl", b'{"prompts": "x"}', "is empty"), ("a.jsonl", b'{"prompt": "x \\ud83d"}', "not UTF-8"),
    ("a.jsonl", b'{"prompt": "x", "image": "no.png"}', "no image"), ("a.jsonl", b'{"prompt": "x", "seed": -1}', "seed"),
    ("a.csv", b"prompt\na, b\n", "2 fields"), ("a.csv", b'prompt\n"a\nb\n', "a.csv"), ("a.json", b"{}", ".jsonl")])
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
    assert line.startswith("likely out of memory: ") and "of a GPU's 24" in line and "\n" not in line


def test_what_is_no_text_or_does_nothing_is_refused(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a red circle", "seed": 3}\n{"prompt": "a blue square", "seed": 0}\n')
    for flags, words in ((["--prompt", "a circle \udcff"], "--prompt holds '\\udcff', which is not UTF-8 text"),
                         (["--prompt", "x", "--negative_prompt", "\udc80", "--guidance_scale", 2], "--negative_prompt holds"),
                         (["--prompts", tmp_path / "p.jsonl", "--output_dir", tmp_path / "out", "--seed", 5],
                          "--seed means nothing where every row of --prompts has its own seed")):
        with pytest.raises(SystemExit) as end:
            run(*flags)
        assert end.value.code == 2 and words in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "x", "image": "n" * 300}) + "\n")
    with pytest.raises(InputError, match="row 1: there is no image"):
        read_prompts(tmp_path / "p.jsonl")


def test_prompts_that_are_cut_are_told(tmp_path, capsys):
    for end, told in (("to the left " * 10, True), ("to the left", False), ("\u00e9" * 60, True)):  # of 128 bytes
        run("--prompt", f"a red circle moving {end}", "--output", tmp_path / "a.mp4", "--num_inference_steps", 1)
        assert ("1 of the prompts are longer than the 128 bytes" in capsys.readouterr().out) == told


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00"])
def test_a_damaged_note_of_how_videos_were_made_is_one_line(tmp_path, text):
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(InputError, match="sample.json is damaged"):
        sample.start_folder(sample.Config("x", output_dir=str(tmp_path)), [])
