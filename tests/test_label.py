"""label.py: what a person presses is on the disk, once; nobody else reaches the page; bad input is one
line."""
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

import common
import label
from common import InputError
from formats import labels, metadata
from formats.video import write_video

ROOT = Path(__file__).resolve().parents[1]
page = pytest.mark.skipif(label.flask is None, reason="Flask is not installed (requirements-label.txt)")


def clips(folder, count=4, first=0):
    rows = []
    for i in range(first, first + count):
        video = np.full((9, 32, 48, 3), 20 * (i % 12),
                        np.uint8) + np.arange(9, dtype=np.uint8)[:, None, None, None]
        write_video(folder / f"{i}.mp4", video)
        rows.append({"file_name": f"{i}.mp4", "prompt": f"prompt {i - first}", "note": [i]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(tmp_path):
    return clips(tmp_path / "clips")


def open_session(folder, annotator="ada", **more):
    return label.Session("clip", label.clip_items(folder), labels.Journal(folder / "labels.jsonl"), annotator,
                         **more)


def open_client(session, scratch="/nowhere"):
    return label.make_app(session, "secret", scratch).test_client()


def get(client, path, host="127.0.0.1:8765", **headers):
    return client.get(f"/secret/{path}", headers={"Host": host} | headers)


def post(client, path, body):
    return client.post(f"/secret/{path}", json=body, headers={"Host": "localhost:9000"})


RED = (200, 40, 30)


def two_fields(path):
    """A red film in which a white bar moves between the two fields of each frame."""
    mark = av.filter.Graph()
    mark.link_nodes(mark.add_buffer(width=96, height=64, format="yuv420p", time_base=Fraction(1, 25)),
                    mark.add("setfield", "tff"), mark.add("buffersink")).configure()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"x264-params": "interlaced=1", "crf": "8"}
        for i in range(10):
            image = np.full((64, 96, 3), RED, np.uint8)
            image[::2, 8 * i:8 * i + 4] = image[1::2, 8 * i + 4:8 * i + 8] = 255
            mark.push(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p"))
            container.mux(stream.encode(mark.pull()))
        container.mux(stream.encode())


# ---- answers
@page
def test_each_answer_is_on_the_disk_before_the_next_clip_shows(folder, monkeypatch):
    session = open_session(folder)
    client, synced, real = open_client(session), [], os.fsync
    there = lambda: len(labels.read_answers(folder / "labels.jsonl"))
    monkeypatch.setattr(os, "fsync", lambda handle: (real(handle), synced.append(there())))
    state, seen = get(client, "state").json, []
    for k, grades in enumerate(((2, 2), (0, 0), (1, 2), (2, 0))):
        assert (state["done"], state["total"]) == (k, 4)
        seen.append(state["now"]["name"])
        state = post(client, "answer",
                     {"id": state["now"]["id"], "physical": grades[0], "deformity": grades[1]}).json
        assert synced[-1] == k + 1
    assert state["now"] is None and state["tables"][1][2] == [[1, 1, 2]] and sorted(seen) == [
        f"{i}.mp4" for i in range(4)]
    said = labels.read_answers(folder / "labels.jsonl")
    assert [(x["file_name"], x["physical"], x["deformity"])
            for x in said] == list(zip(seen, (2, 0, 1, 2), (2, 0, 2, 0)))
    assert all(set(x) == {"file_name", "annotator", "physical", "deformity", "contents", "time"}
               for x in said)
    assert seen != sorted(seen)                                         # shuffled, and for everyone alike
    session.journal.file.close()
    assert open_session(folder, "ben").coming(9) == [session.index[name,] for name in seen]


def test_undo_and_skip(folder):
    session = open_session(folder)
    a, b, c, d = session.coming(4)
    good, bad = {"physical": 2, "deformity": 2}, {"physical": 0, "deformity": 0}
    session.answer(a, good)
    session.skip(b)
    assert session.coming(9) == [c, d, b]
    session.answer(c, bad)
    session.undo()
    session.undo()
    assert session.coming(9) == [a, c, d, b] and labels.read_answers(folder / "labels.jsonl") == []
    session.skip(a)
    assert session.coming(9) == [c, d, b, a]
    session.answer(c, good)
    session.journal.file.close()
    assert open_session(folder).coming(9) == [a, b, d]             # a restart knows answers, and nothing else


@page
def test_an_undo_that_is_sent_twice_takes_back_one_answer(folder):
    session = open_session(folder)
    client = open_client(session)
    for i in session.coming(2):
        session.answer(i, {"physical": 2, "deformity": 2})
    assert [post(client, "undo", {"done": 2}).json["done"] for _ in range(2)] == [1, 1]
    assert post(client, "undo",
                {"done": 1}).json["done"] == 0 == post(client, "undo", {"done": 0}).json["done"]


@page
def test_what_is_no_answer_is_refused_and_a_full_disk_is_told(folder, monkeypatch):
    session = open_session(folder)
    client, before = open_client(session), (folder / "labels.jsonl").read_bytes()
    for body in (None, [], {}, {"id": 0}, {"id": 9, "physical": 1, "deformity": 1},
                 {"id": -1, "physical": 1, "deformity": 1}, {"id": "0", "physical": 1, "deformity": 1},
                 {"id": 0, "physical": 3, "deformity": 1}, {"id": 0, "physical": 1, "deformity": None},
                 {"id": 0, "physical": True, "deformity": 1}):
        assert post(client, "answer", body).status_code == 400, body
    monkeypatch.setattr(os, "fsync",
                        lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    reply = post(client, "answer", {"id": 0, "physical": 1, "deformity": 1})
    assert reply.status_code == 507 and "No space left on device" in reply.text
    assert (folder / "labels.jsonl").read_bytes() == before and not session.answers


@page
def test_a_clip_that_is_deleted_meanwhile_is_left_out(folder):
    session = open_session(folder)
    client = open_client(session)
    now, then = session.coming(2)
    for path in session.items[now]["files"]:
        path.unlink()
    assert get(client, f"clip/{now}/0").status_code == 410
    state = post(client, "answer", {"id": now, "skip": True}).json
    assert state["now"]["id"] == then and (state["gone"], state["total"], state["done"]) == (1, 3, 0)


# ---- who may see what
@page
def test_only_who_was_told_the_address_and_only_clips_of_the_folder(folder, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    write_video(tmp_path / "outside.mp4", np.zeros((5, 32, 32, 3), np.uint8))
    (folder / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    with (folder / "metadata.jsonl").open("a") as file:
        for name in ("../outside.mp4", str(tmp_path / "outside.mp4"), "link.mp4", "none.mp4", "./0.mp4"):
            file.write(json.dumps({"file_name": name, "prompt": "x"}) + "\n")
    session = open_session(folder)
    client = open_client(session)
    assert sorted(item["show"]["name"] for item in session.items) == [f"{i}.mp4" for i in range(4)]
    assert get(client, "").status_code == 200 == get(client, "state").status_code
    for path in ("/", "/state", "/wrong/state", "/secrets/state", "/static/x", "/secret", "/wrong/clip/0/0"):
        assert client.get(path, headers={"Host": "127.0.0.1:8765"}).status_code in (403, 308), path
    for host in ("evil.example", "127.0.0.1.evil.example:8765", "192.168.0.2:8765"):
        assert get(client, "state", host).status_code == 403
    for path in ("clip/4/0", "clip/0/1", "clip/-1/0", "clip/../secret.txt", "clip/..%2Fsecret.txt",
                 "secret.txt", "metadata.jsonl"):
        assert get(client, path).status_code in (403, 404, 410), path


@page
def test_ranges_so_that_seeking_works(folder, tmp_path):
    session = open_session(folder)
    client, whole = open_client(session), session.items[0]["files"][0].read_bytes()
    assert get(client, "clip/0/0").data == whole
    part = get(client, "clip/0/0", Range="bytes=100-199")
    assert part.status_code == 206 and part.data == whole[100:200]
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(whole)}"
    again = get(open_client(session, tmp_path), "clip/0/0?as=mp4")      # for what a browser does not play
    with av.open(str(tmp_path / "1.mp4")) as copy:
        assert again.status_code == 200 and copy.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in copy.decode(video=0)) == 9
    session.items[0]["files"][0].write_bytes(whole[:200])
    assert "damaged" in get(open_client(session, tmp_path / "new"), "clip/0/0?as=mp4").text


@page
def test_many_requests_for_one_clip_make_one_conversion(folder, tmp_path, monkeypatch):
    session = open_session(folder)
    client, made, real = open_client(session, tmp_path), [], label.copy_for_browser

    def slow(source, path):
        made.append(source)
        time.sleep(0.2)                                                 # the others come meanwhile
        real(source, path)

    monkeypatch.setattr(label, "copy_for_browser", slow)
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(lambda: get(client.application.test_client(), "clip/0/0?as=mp4"))
                 for _ in range(6)]
        replies = [one.result() for one in asked]
    assert {reply.status_code
            for reply in replies} == {200} and len({reply.data for reply in replies}) == 1 == len(made)
    session.items[1]["files"][0].write_bytes(b"nonsense")   # a failure is shared, too, and each gets its line
    assert ["damaged" in get(client, "clip/1/0?as=mp4").text
            for _ in range(2)] == [True, True] and len(made) == 2
    shutil.copy(session.items[0]["files"][0], session.items[1]["files"][0])
    assert get(client, "clip/1/0?as=mp4").status_code == 200 and len(made) == 3         # mended
    os.utime(session.items[0]["files"][0], (1, 1))                      # another film under the same name
    assert get(client, "clip/0/0?as=mp4").status_code == 200 and len(made) == 4
    monkeypatch.setattr(label, "copy_for_browser",
                        lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    reply = get(client, "clip/2/0?as=mp4")
    assert reply.status_code == 507 and "No space left on device" in reply.text


@page
def test_only_the_latest_copies_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(label, "copy_for_browser", lambda source, path: path.write_text(str(source)))
    (tmp_path / "copies").mkdir()
    copies, sources = label.Copies(tmp_path / "copies"), [tmp_path / str(i) for i in range(label.COPIES + 3)]
    for source in sources:
        source.write_text("x")
        assert copies.of(source).read_text() == str(source)
    assert sorted(path.read_text()
                  for path in (tmp_path / "copies").iterdir()) == sorted(map(str, sources[3:]))
    assert copies.of(sources[0]).read_text() == str(sources[0]) and len(copies.made) == len(
        copies.turns) == label.COPIES


def test_a_long_clip_is_converted_without_much_memory(tmp_path):
    """Of 400 frames of 480x272, 157 MB as RGB, few are in memory at a time."""
    write_video(tmp_path / "a.mp4", np.broadcast_to(np.uint8(0), (400, 272, 480, 3)), 30)
    code = ("import resource, sys; from formats.video import copy_for_browser, read_clip;"
            "read_clip(sys.argv[1], frames=8);"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
            "copy_for_browser(sys.argv[1], sys.argv[2]);"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.mp4", tmp_path / "b.mp4"], cwd=ROOT,
                          capture_output=True, text=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert int(done.stdout) < 80 * 1024                                 # KiB
    with av.open(str(tmp_path / "b.mp4")) as copy:
        assert copy.streams.video[0].frames == 400


@page
def test_what_a_browser_would_show_otherwise_is_converted_unasked(folder, tmp_path):
    two_fields(folder / "0.mp4")
    session = open_session(folder)
    client, item = open_client(session, tmp_path), session.index["0.mp4",]
    (tmp_path / "copy.mp4").write_bytes(get(client, f"clip/{item}/0").data)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        assert not any(frame.interlaced_frame for frame in container.decode(video=0))
    state = get(client, "state").json
    assert state["now"]["fps"] == [25 if state["now"]["id"] == item else 8]
    other = session.index["1.mp4",]
    assert get(client, f"clip/{other}/0").data == (folder / "1.mp4").read_bytes()


# ---- pairs
@page
def test_pairs_are_blind_and_sides_are_drawn(tmp_path):
    a, b = clips(tmp_path / "a", 40), clips(tmp_path / "b", 41, first=100)
    items = label.pair_items([str(a), str(b)], 0)
    assert items == label.pair_items([str(a), str(b)], 0) and len(items) == 40
    lefts = [item["line"]["left"] for item in items]
    assert 10 < lefts.count("a") < 30 and lefts != [item["line"]["left"]
                                                    for item in label.pair_items([str(a), str(b)], 1)]
    session = label.Session("pair", items, labels.Journal(a / "pairs.jsonl"), "ada")
    client = open_client(session)
    state, wanted = get(client, "state").json, []
    for k in range(40):
        item = session.items[state["now"]["id"]]
        assert set(state["now"]) == {"id", "prompt",
            "fps"} and item["line"]["a"] == f"{int(item['line']['b'][:-4]) - 100}.mp4"
        left, right = (get(client, f"clip/{state['now']['id']}/{side}").data for side in (0, 1))
        assert (left, right)["ab".index(item["line"]["left"])] == (a / item["line"]["a"]).read_bytes()
        choice = ("left", "right", "tie")[k % 3]
        wanted.append({"left": item["line"]["left"], "right": "ba"["ab".index(item["line"]["left"])],
                       "tie": "tie"}[choice])
        state = post(client, "answer", {"id": state["now"]["id"], "winner": choice}).json
    said = labels.read_answers(a / "pairs.jsonl", "pair")
    assert [line["winner"] for line in said] == wanted and {line["against"] for line in said} == {"../b"}
    (_, _, [row]), = state["tables"]
    assert row[1:4] == [40, 40, 1] and row[4].startswith(f"{wanted.count('a') / 40:.3f} [")
    assert row[5].startswith("0.325 [") and row[6].startswith(f"{wanted.count('b') / 40:.3f} [")


# ---- report and export
def say(folder, *answers):
    lines = [{"file_name": name, "annotator": who, "physical": p, "deformity": d, "time": 0.0} for name, who,
             p, d in answers]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_export_changes_labels_and_nothing_else(folder, capsys):
    text = (folder / "metadata.jsonl").read_text().splitlines(True)
    text[1] = '{"video": "1.mp4",  "reward": 1, "prompt": "vier \u2028 ä"}\n'
    text[3] = '{"file_name": "3.mp4", "label": 1,   "prompt": "untouched"}\n'
    (folder / "metadata.jsonl").write_text("".join(text))
    say(folder, ("0.mp4", "ada", 2, 2), ("1.mp4", "ada", 0, 0), ("1.mp4", "ben", 2, 2),
        ("./2.mp4", "ada", 0, 1), ("gone.mp4", "ada", 0, 0))
    label.export_command(label.Said(folder=str(folder), bad="any"))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").open(newline="")]
    assert rows[:3] == [json.loads(text[0]) | {"label": 1},
                        {"video": "1.mp4", "reward": None, "prompt": "vier \u2028 ä"},
                        json.loads(text[2]) | {"label": 0}]
    assert (folder / "metadata.jsonl").read_text().endswith(text[3]) and not (
        folder / "metadata.jsonl.tmp").exists()
    out = capsys.readouterr().out
    assert "1 good, 1 bad, 1 dropped, 1 without answers left" in out and "1 answered clips are not" in out
    assert [row["label"] for row in metadata.read_metadata(folder)] == [1, None, 0, 1]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text('file_name,prompt,extra\n0.mp4,"a, b",x\n1.mp4,c,y\n3.mp4,d,z\n')
    label.export_command(label.Said(folder=str(folder)))
    assert list(csv.reader((folder / "metadata.csv").open())) == [["file_name", "prompt", "extra", "label"],
        ["0.mp4", "a, b", "x", "1"], ["1.mp4", "c", "y", ""], ["3.mp4", "d", "z", ""]]


def test_report_tells_counts_and_agreement(folder, capsys):
    say(folder, ("0.mp4", "ada", 2, 2), ("1.mp4", "ada", 0, 0), ("0.mp4", "ben", 2, 2),
        ("1.mp4", "ben", 0, 1))
    label.report_command(label.Said(folder=str(folder)))
    out = capsys.readouterr().out
    assert "| ada | 2 | 1 / 0 / 1 | 1 / 0 / 1 |" in out and "| 1 | 0 | 1 |" in out
    assert "| ada and ben (Cohen) | 1.00 (2) | 0.33 (2) | 0.33 (2) |" in out      # (1/2 - 1/4) / (3/4)


# ---- nonsense
@page
def test_bad_input_is_one_line_and_leaves_nothing_behind(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_rows").mkdir()
    (tmp_path / "no_rows/metadata.jsonl").write_text("")
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged/labels.jsonl").write_text("garbage}\n")
    shutil.copytree(folder, tmp_path / "alone")
    for path in (tmp_path / "alone").glob("*.mp4"):
        path.unlink()
    clips(tmp_path / "other", 2)
    (tmp_path / "other/metadata.jsonl").write_text((tmp_path / "other/metadata.jsonl").read_text().replace(
                                                       "prompt ", "said "))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        before = sorted(tmp_path.rglob("*"))
        for argv, words in ((["nowhere"], "nowhere: no such folder"),
                            (["empty"], "empty: no metadata.jsonl or metadata.csv in it"),
                            (["no_rows"], "no_rows: its metadata file has no rows"),
                            (["alone"], "none of the clips in its metadata is there"),
                            (["damaged", "--port", "0"], "damaged/labels.jsonl line 1: not a JSON object: "
                             "mend or remove that line"), (["report", "damaged"], "labels.jsonl line 1"),
                            (["export", "damaged"], "labels.jsonl line 1"),
                            (["report", "clips"], "no answers in a labels.jsonl"),
                            (["export", "clips"], "labels.jsonl: no answers"),
                            (["clips", "--port", str(port)], f"--port {port}: address already in use"),
                            (["clips", "--port", "70000"], "--port must be"),
                            (["clips", "--annotator", " "], "--annotator is empty"),
                            (["clips", "--bad", "some"], "--bad: invalid choice"), ([], "required: folder"),
                            (["--pairs", "clips"], "--pairs takes two folders, got 1"),
                            (["--pairs", "clips", "nowhere"], "nowhere: no such folder"),
                            (["--pairs", "clips", "other"], "no prompt is in both folders")):
            stderr = []
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
                patch.chdir(tmp_path)
                patch.setattr(sys, "stderr", SimpleNamespace(write=stderr.append, flush=lambda: None))
                name, config = argv[0] if argv else "", label.Pairs if "--pairs" in argv else label.Clips
                common.cli(*label.COMMANDS.get(name, (label.serve, config)), "doc",
                           argv[name in label.COMMANDS:])
            text = "".join(stderr)
            assert stop.value.code == 2 and text.count("\n") == 1 and words in text, (argv, text)
        assert sorted(tmp_path.rglob("*")) == before


def test_without_flask_one_line_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(label, "flask", None)
    with pytest.raises(InputError, match="pip install -r requirements-label.txt"):
        label.serve(label.Clips(folder=str(folder)))


# ---- a person at work
class Server:
    def __init__(self, *argv):
        # ignored behind a `&`
        self.process = subprocess.Popen([sys.executable, ROOT / "label.py", *map(str, argv), "--port", "0"],
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=os.environ | {"OMP_NUM_THREADS": "1"},
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        lines = [self.process.stdout.readline() for _ in range(3)]
        self.told, self.address = lines[0], re.search(r"http://127\.0\.0\.1:\d+/\S+/", lines[1])[0]

    def end(self, how):
        self.process.send_signal(how)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@page
def test_a_second_one_on_the_folder_is_refused_and_ctrl_c_reports(folder):
    server = Server(folder, "--annotator", "ada")
    with pytest.raises(InputError, match="another label.py has this folder open: stop that one first"):
        label.serve(label.Clips(folder=str(folder), port=0))
    code, out, err = server.end(signal.SIGINT)
    assert (code, err) == (0, "") and "0 of 4 clips answered by ada" in out


@pytest.fixture
def browser(tmp_path):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no chromium and chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver",
                                    reason="selenium is not installed (requirements-test.txt)")
    options, profile = webdriver.ChromeOptions(), tempfile.mkdtemp(dir=tmp_path)
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                 "disable-background-networking", "disable-component-update", "disable-sync",
                 "window-size=1440,900", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield found
    found.quit()


def wait(what, wanted):
    end = time.monotonic() + 20
    while what() != wanted and time.monotonic() < end:
        time.sleep(0.02)
    assert what() == wanted


@page
def test_ten_clips_by_keys_through_reload_and_kill_9(tmp_path, browser):
    folder = clips(tmp_path / "clips", 10)
    server = Server(folder, "--annotator", "ada")
    said = lambda: labels.read_answers(folder / "labels.jsonl")
    look = lambda script: browser.execute_script(f"return {script}")

    def press(*keys):
        for key in keys:
            browser.find_element("tag name", "body").send_keys(key)

    count = lambda: look("document.getElementById('count').textContent")
    playing = lambda: look("[slots[0].front.currentTime > 0, slots[0].front.videoWidth, "
                           "slots[0].front.paused]")
    try:
        browser.get(server.address)
        wait(count, "0 of 10")
        wait(playing, [True, 48, False])
        name = look("state.now.name")
        press("1", "3")
        wait(count, "1 of 10")
        assert [(x["file_name"], x["physical"], x["deformity"]) for x in said()] == [(name, 2, 0)]
        wait(playing, [True, 48, False])                                # the one that was loaded meanwhile
        press("2", "\ue003")                                  # a first grade, taken back: nothing is said yet
        assert look("grades") == [] and len(said()) == 1
        press("\ue003")                                                 # and now the answer
        wait(count, "0 of 10")
        assert said() == [] and look("state.now.name") == name
        press("1", "1")
        wait(count, "1 of 10")
        skipped = look("state.now.name")
        press("s")
        wait(lambda: look("state.now.name") != skipped, True)
        press(" ")
        wait(lambda: look("slots[0].front.paused"), True)
        for k in (2, 3, 4):
            press("3", "3")
            wait(count, f"{k} of 10")
        browser.refresh()
        wait(count, "4 of 10")
        press("1", "2")
        wait(count, "5 of 10")
        before = said()
        server.end(signal.SIGKILL)
        press("1", "1")                                         # nobody is there to save it: the page says so
        wait(lambda: "Not saved yet" in look("document.getElementById('trouble').textContent"), True)
        assert said() == before and len(before) == 5
        server = Server(folder, "--annotator", "ada")
        assert server.told == "10 clips, 5 answered by ada\n"
        browser.get(server.address)
        wait(count, "5 of 10")
        for k in range(6, 11):
            press("j", "l")                                             # the same grades under the right hand
            wait(count, f"{k} of 10")
        wait(lambda: look("document.getElementById('end').innerText.startsWith('All 10 clips are answered')"),
             True)
        assert [(x["physical"], x["deformity"])
                for x in said()] == [(2, 2)] + [(0, 0)] * 3 + [(2, 1)] + [(2, 0)] * 5
        assert len({x["file_name"] for x in said()}) == 10
        killed = ("ERR_CONNECTION_REFUSED", "ERR_CONTENT_LENGTH_MISMATCH", "ERR_CONNECTION_RESET",
                  "ERR_EMPTY_RESPONSE")
        assert not [line for line in browser.get_log("browser")
                    if not any(how in line["message"] for how in killed)]
    finally:
        code, out, _ = server.end(signal.SIGINT)
    assert code == 0 and "| 1 | 3 | 6 |" in out


@page
def test_the_page_shows_the_colours_that_are_read_and_steps_by_frames(tmp_path, browser):
    """Large, tall and small ones of ours, an interlaced one, a codec that no browser has, and rates of 8 to
    30 a second. The number of a frame is its share of blue."""
    folder, fps = tmp_path / "clips", {"large": 8, "tall": 30, "small": 24}
    for name, size in (("large", (720, 128)), ("tall", (832, 48)), ("small", (64, 96))):
        film = np.full((12, *size, 3), RED, np.uint8)
        film[..., 2] += np.arange(0, 120, 10, dtype=np.uint8)[:, None, None]
        write_video(folder / f"{name}.mp4", film, fps[name])
    with av.open(str(folder / "lossless.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=12)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for image in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image,
                                            format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    two_fields(folder / "fields.mp4")
    names = [path.name for path in sorted(folder.iterdir())]
    rows = [{"file_name": name, "prompt": "x"} for name in names]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server, seen = Server(folder, "--annotator", "ada"), {}
    look = lambda script: browser.execute_script(f"return {script}")
    pixels = """(() => { const player = slots[0].front, canvas = document.createElement("canvas")
        canvas.width = player.videoWidth; canvas.height = player.videoHeight
        canvas.getContext("2d").drawImage(player, 0, 0)
        return [...canvas.getContext("2d").getImageData(canvas.width - 4, 0, 1, 40).data] })()"""
    type_at = lambda code, key: look(f"document.dispatchEvent(new KeyboardEvent('keydown', {{code: '{code}', "
                                     f"key: '{key}'}}))")

    try:
        browser.get(server.address)
        for done in range(5):
            wait(lambda: look("state && state.done"), done)
            wait(lambda: look("slots[0].front.readyState >= 2"), True)
            name = look("state.now.name")
            look("((paused = true), slots[0].front.pause(), slots[0].front.currentTime = 0.001, 0)")
            wait(lambda: look("slots[0].front.seeking"), False)
            reads = []
            for _ in range(6):
                wait(lambda: look("slots[0].front.seeking"), False)
                time.sleep(0.1)
                reads.append(np.array(look(pixels)).reshape(40, 4)[:, :3].mean(0))
                type_at("Period", "\u044e")                      # where a Russian keyboard has another letter
            seen[name] = np.array(reads)
            type_at("Digit1", "&")                                      # as French keyboards type
            assert look("grades") == [2]
            type_at("Numpad3", "PageDown")
        wait(lambda: look("document.getElementById('end').innerText.startsWith('All 5 clips')"), True)
    finally:
        server.end(signal.SIGINT)
    said = labels.read_answers(folder / "labels.jsonl")
    assert sorted(seen) == names and {(x["physical"], x["deformity"]) for x in said} == {(2, 0)}
    for name, reads in seen.items():
        due = np.array([RED] * 6) + [[0, 0, 0 if name == "fields.mp4" else 10 * i] for i in range(6)]
        assert np.abs(reads - due).max() <= 5, (name, reads)
