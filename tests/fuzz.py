"""Random damage to everything that is read from disk, for so many minutes.

    python tests/fuzz.py --minutes 2                    another beginning every time; --seed n repeats one

Each case damages one file of a small folder (metadata in both formats, clips in mp4, mkv and webm, weights
and configs, shards and shards.json, checkpoints, args.json, metrics.jsonl) and runs a command on it. It must
end with exit code 0, or with 1 or 2 and one line; within a minute; and nothing of the user's may change.
Cases run in a process of their own, so that one that dies is told. """
import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fuzz_runs
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

import common
import data
from common import InputError, arg
from formats import metadata

LIMIT = 60                                                      # seconds a case may take
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)
NAMES = st.sampled_from(["a.mp4", "b.mkv", "c.webm", "../a.mp4", "nowhere.mp4", "a.mp4/x", ".", "",
                         "/dev/null"])
FIELDS = st.sampled_from(["file_name", "video", "file", "prompt", "text", "caption", "label", "reward",
                          "Label ", "note"])
ROW = st.dictionaries(FIELDS, NAMES | st.text(max_size=30) | st.integers(-2, 3) | VALUES, max_size=5)
ROWS = st.lists(ROW, min_size=1, max_size=5)


@dataclass
class Config:
    minutes: float = arg(2.0, "how long", above=0)
    seed: int | None = arg(None, "of the first case; without, the clock's", at_least=0)
    worker: str | None = arg(None, "folder to work in, for the process that runs the cases")


# ---- the damage
def damaged(content, rng):
    """content, bytes, with a cut, flipped bits, a doubled or dropped piece, or a number out of range in its
    head."""
    content = bytearray(content)
    place = lambda: rng.choice((rng.randrange(len(content)), rng.randrange(min(len(content), 300))))
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not content:
            break
        kind, i = rng.randrange(6), place()
        if kind == 0:
            del content[i:]
        elif kind == 1:
            content[i] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[i:i + rng.choice((1, 4, 100))]
        elif kind == 3:
            content[i:i] = content[i:i + rng.choice((1, 4, 100))]
        elif kind == 4:
            content[i:i + 8] = struct.pack("<q", rng.choice((0, -1, 2 ** 31, 2 ** 62, 255)))
        else:
            content[i:i + 4] = rng.choice((b"null", b"1e99", b"-1.5", b"[[[[", b'"x":', b"\xff\xfe\x00\x80"))
    return bytes(content)


def damaged_json(value, rng):
    """A value of JSON with one part replaced by another kind of thing, or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        changed = {k: damaged_json(v, rng) if k == key else v for k, v in value.items()}
        if rng.random() < 0.15:
            del changed[key]
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [damaged_json(v, rng) if j == i else v for j, v in enumerate(value)]
    return rng.choice((None, -1, 0, 1, 2 ** 70, 1e400, 0.5, "", "x", "../..", [], {}, [1, [2]], {"a": None},
                       True, "a\ud800"))


# ---- the commands, each on a folder that was copied for it
def call(script, argv):
    """-> (exit code, stderr) of a script's command line, in this process."""
    main, Config = (data.COMMANDS[argv[0]] if script == "data"
                    else (sys.modules[script].main, sys.modules[script].Config))
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            common.cli(main, Config, "", argv[script == "data":])
        except SystemExit as stop:
            code = stop.code
    return code, stderr.getvalue()


def contents(folder, but=()):
    """{path: bytes} of the files in folder, but for those in folders named in `but`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not set(path.relative_to(folder).parts) & {*but, ".lock"}}


def judge(case, folder, script, argv, ours=("out",)):
    """Runs one case. Raises AssertionError saying what broke its promise. ours: folders in which the command
    may write."""
    before, start = contents(folder, ours), time.monotonic()
    print(json.dumps({"case": case, "argv": [script, *argv]}), flush=True)
    signal.alarm(LIMIT)
    try:
        code, stderr = call(script, argv)
    except BaseException as error:
        raise AssertionError(f"{case}: {script} {argv}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    last = stderr.replace("\r", "\n").splitlines()[-1:] or [""]
    assert code in (0, 1, 2), f"{case}: exit code {code}"
    assert code == 0 or last[0].startswith("error: "), f"{case}: exit code {code}, last line {last[0]!r}"
    assert "Traceback" not in stderr, f"{case}: a traceback: {stderr[-500:]}"
    assert contents(folder, ours) == before, f"{case}: the user's files have changed"
    return code, time.monotonic() - start


def rows_of_metadata(folder, rng, first):
    """hypothesis makes the rows, and shrinks those that break something."""
    def write(rows, suffix, plain):
        where = folder / "clips"
        for old in where.glob("metadata.*"):
            old.unlink()
        if suffix == "csv":
            keys = list(dict.fromkeys(key for row in rows for key in row))
            cell = lambda x: str(x) if plain else '"' + str(x).replace('"', '""') + '"'
            text = "\n".join([",".join(keys),
                              *(",".join(cell(row.get(key, "")) for key in keys) for row in rows)])
        else:
            text = "\n".join(json.dumps(row, ensure_ascii=plain) for row in rows)
        (where / f"metadata.{suffix}").write_bytes(text.encode("utf-8", "surrogatepass"))

    @seed(first)
    @settings(max_examples=20, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(ROWS, st.sampled_from(("jsonl", "csv")), st.sampled_from(("check", "encode")), st.booleans())
    def run(rows, suffix, command, plain):
        write(rows, suffix, plain)
        shutil.rmtree(folder / "out", ignore_errors=True)
        out = ["--out", str(folder / "out")] if command == "encode" else []
        judge(f"metadata.{suffix} {rows!r}", folder, "data", [command, str(folder / "clips"), *out])

    run()


def clip(folder, rng, first):
    path = rng.choice(sorted((folder / "clips").glob("?.*")))
    path.write_bytes(damaged(path.read_bytes(), rng))
    command = rng.choice(("check", "encode"))
    out = ["--out", str(folder / "out")] if command == "encode" else []
    judge(path.name, folder, "data", [command, str(folder / "clips"), *out])


def train(folder, name, *more, out="out"):
    from tiny import command
    script, argv = command(folder, name, out, "--max_train_steps", "3", *more)
    return script, argv


def damage_one(path, rng):
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.7:
        try:
            lines = [json.loads(line)
                     for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else None
            value = damaged_json(lines or json.loads(path.read_text()), rng)
            rows = value if isinstance(value, list) else [value]
            return path.write_text("".join(json.dumps(x) + "\n" for x in rows) if lines
                                   else json.dumps(value))
        except ValueError:
            pass
    path.write_bytes(damaged(path.read_bytes(), rng))


def weights(folder, rng, first):
    path = rng.choice([path for path in sorted((folder / "generator").rglob("*")) if path.is_file()])
    damage_one(path, rng)
    judge(str(path.relative_to(folder)), folder, *train(folder, rng.choice(("prfl", "refl", "reward"))))


def shards(folder, rng, first):
    path = rng.choice([path for path in sorted((folder / "data").rglob("*")) if path.is_file()])
    damage_one(path, rng)
    judge(str(path.relative_to(folder)), folder, *train(folder, rng.choice(("sft", "reward"))))


def checkpoint(folder, rng, first):
    name = rng.choice(("prfl", "reward"))
    out = folder / f"out-{name}"
    kept = out / "checkpoint-000002"
    path = rng.choice([path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"])
    damage_one(path, rng)
    before = contents(kept)
    script, argv = train(folder, name, "--resume", "latest", out=out.name)
    code, _ = judge(str(path.relative_to(folder)), folder, script, argv, ours=(out.name,))
    assert code == 0 or contents(kept) == before, f"{path}: a refused run has changed its checkpoint"


# ---- lists: what a writer may change is known, so every other byte can be compared
SPELLINGS = {None: ("", " "), 0: ("0", "0.0", "False", " 0 "), 1: ("1", "1.0", "true", "TRUE ")}
PIECES = (b"a red circle", b"x, y", b'say ""yes""', b"caf\xe9", b"\xed\xa0\x80",
          "\u2028 \u00e4 \ufeff".encode(), b"one\ntwo", b"a\r\nb", b";", b"#", b"'", b"\t", b"-",
          7000 * b"long ")


def csv_cell(rng, content, plain=False):
    """content (quotes doubled), between quotes or as it is; plain: it holds nothing that needs quotes."""
    quoted = not plain and any(c in content for c in b',"\r\n') or content[:1] == b" " or rng.random() < 0.4
    left, right = rng.choice((b"", b"", b" ", b"   ")), b"" if quoted else rng.choice((b"", b"", b"  "))
    return left + (b'"' + content + b'"' if quoted else content) + right


def csv_list(rng, rows, new):
    """-> (a metadata.csv of rows [(name, label or None)], the same with the labels that `new` {name: label}
    changes)."""
    columns = [rng.choice((b"file_name", b"Video", b"FILE")), rng.choice((b"prompt", b"Text")), b"note",
               b"caf\xe9"]
    labelled = rng.random() < 0.7
    if labelled:
        columns.append(rng.choice((b"label", b"Reward ")))
    rng.shuffle(columns)
    ends = rng.choice(((b"\n",), (b"\r\n",), (b"\r",), (b"\n", b"\r\n", b"\r")))
    before = after = rng.choice((b"", b"\xef\xbb\xbf"))
    blank = lambda: rng.choice((b"", b"", rng.choice(ends), b"  " + rng.choice(ends),
                                b"," * (len(columns) - 1) + rng.choice(ends)))
    rows = rows if labelled else [(name, None) for name, _ in rows]
    is_changed = any(name in new and new[name] != label for name, label in rows)
    header = b",".join(csv_cell(rng, name, True) for name in columns)
    lines = [(header, header + b",label" if is_changed and not labelled else header)]
    for name, label in rows:
        old, cells = rng.choice(SPELLINGS[label]).encode(), []
        target = new.get(name, label)
        for column in columns:
            if column in (b"label", b"Reward "):
                was = now = csv_cell(rng, old, True)
                fresh = ("" if target is None else str(target)).encode()
                if target != label and label is None:           # into its blanks, behind them
                    now = was[:-1] + fresh + b'"' if was.endswith(b'"') else was + fresh
                elif target != label:
                    now = was.replace(old.strip(), fresh)
                cells.append((was, now))
            elif column in (b"file_name", b"Video", b"FILE"):
                cells.append((csv_cell(rng, name.encode()),) * 2)
            else:
                usual = rng.choice(PIECES) if column not in (b"prompt", b"Text") else b"a, b"
                cells.append((csv_cell(rng, usual),) * 2)
        was, now = (b",".join(cell[i] for cell in cells) for i in (0, 1))
        if is_changed and not labelled:
            now += b"," + ("" if target is None else str(target)).encode()
        lines.append((was, now))
    for i, (was, now) in enumerate(lines):
        empty, end = blank(), rng.choice(ends)
        if i == len(lines) - 1 and rng.random() < 0.3:
            end = b""
        before, after = before + empty + was + end, after + empty + now + end
    return before, after


def jsonl_list(rng, rows, new):
    """As `csv_list`, a metadata.jsonl."""
    before = after = rng.choice((b"", b"\xef\xbb\xbf"))
    strange = (b'"caf\xe9"', b'"\\ud83d"', b'{"label": [1, {"x": "}"}]}', b"NaN", b'"\\"label\\": 1, '
                                                                                  b'}"', b"[]", b"1e400",
               '"\u2028"'.encode(), b'"' + 7000 * b"long " + b'"')
    for i, (name, label) in enumerate(rows):
        target, blanks = new.get(name, label), lambda: rng.choice((b"", b" ", b"\t "))
        old = rng.choice({None: (b"null", b'""', b""), 0: (b"0", b"0.0", b"false", b'"0"'),
                          1: (b"1", b"1.0", b"true")}[label])
        members = [(rng.choice((b'"file_name"', b'"Video"')), f'"{name}"'.encode()),
                   (b'"prompt"', b'"a, \\"b\\""'), (b'"note"', rng.choice(strange)),
                   (b'"lab"', rng.choice(strange))]
        if old:
            members += [(rng.choice((b'"label"', b'"REWARD"')), b"@")]
            if label is not None and rng.random() < 0.2:
                members += [members[-1]]                        # twice the same is no contradiction
        rng.shuffle(members)
        line = b",".join(blanks() + key + blanks() + b":" + blanks() + value
                         + (blanks() if j < len(members) - 1 else b"") for j,
                         (key, value) in enumerate(members))
        fresh = b"null" if target is None else str(target).encode()
        was = line.replace(b"@", old)
        now = was if target == label else line.replace(b"@", fresh) if old else line + b', "label": ' + fresh
        empty, tail = rng.choice((b"", b"", b"\n", b" \r\n")), rng.choice((b"}", b" }", b"}\r", b"} "))
        tail += b"" if i == len(rows) - 1 and rng.random() < 0.3 else b"\n"
        before, after = before + empty + b"{" + was + tail, after + empty + b"{" + now + tail
    return before, after


def list_case(rng):
    """-> (suffix, {name: label} to write, the list before, the list after)."""
    names = [f"{i}.mp4" for i in range(rng.choice((1, 2, 5)))] + ["a b.mp4"]
    rows = [(name, rng.choice((None, 0, 1))) for name in names]
    new = {name: rng.choice((None, 0, 1)) for name in names if rng.random() < 0.7}
    suffix = rng.choice(("csv", "jsonl"))
    return suffix, new, *(csv_list if suffix == "csv" else jsonl_list)(rng, rows, new)


def lists(folder, rng, first):
    """Labels are written into lists of random dialects."""
    where = folder / "lists"
    where.mkdir()
    for i in range(50):
        suffix, new, before, after = list_case(rng)
        path = where / f"metadata.{suffix}"
        path.write_bytes(before)
        print(json.dumps({"case": f"{i}, {suffix}"}), flush=True)
        try:
            metadata.write_labels(where, new)
        except BaseException as error:
            raise AssertionError(f"{before!r} {new}: {type(error).__name__}: {error}") from error
        assert path.read_bytes() == after, f"{before!r} {new}: {path.read_bytes()!r}, not {after!r}"
        assert [x.name for x in where.iterdir()] == [path.name]
        path.unlink()


def half_made(folder, rng, first):
    fuzz_runs.half_made(folder, rng, judge, train)


KINDS = (rows_of_metadata, clip, weights, shards, checkpoint, lists, half_made)


def prepare(folder):
    """The folder that each case gets a copy of."""
    import av
    from tiny import TINY, command, generator, run, write_data

    from formats.video import write_video
    from formats.weights import save_module
    from model import export_transformer
    from pavrm import PAVRM
    from refl_baseline import PixelReward
    from world.vae import VideoVAE
    export_transformer(generator(), folder / "generator/transformer")
    save_module(PAVRM.from_generator(generator(), 1), folder / "generator/reward")
    save_module(VideoVAE(dim=8, num_blocks=1), folder / "generator/vae")
    save_module(PixelReward("first", TINY["text_dim"], width=8), folder / "generator/reward_rgb_first")
    write_data(folder / "data")
    g, rows = torch.Generator().manual_seed(0), []
    for name, codec in (("a.mp4", None), ("b.mkv", "libx264"), ("c.webm", "libvpx")):
        video, path = torch.randint(0, 255, (9, 32, 32, 3), dtype=torch.uint8,
                                    generator=g), folder / "clips" / name
        if codec is None:
            write_video(path, video)
        else:
            with av.open(str(path), "w") as container:
                stream = container.add_stream(codec, rate=8)
                stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
                for image in video.numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
        rows.append(json.dumps({"file_name": name, "prompt": f"clip {name}", "label": len(rows) % 2}))
    (folder / "clips/metadata.jsonl").write_text("\n".join(rows))
    for name in ("prfl", "reward"):
        run(*command(folder, name, f"out-{name}", "--max_train_steps", "2"))


def work(folder, first, minutes):
    """The process that runs the cases: prints each before it starts, and what went wrong."""
    import train_align  # noqa: F401
    import train_reward  # noqa: F401
    torch.set_num_threads(1)

    def too_long(*_):
        raise TimeoutError(f"took longer than {LIMIT} s")

    signal.signal(signal.SIGALRM, too_long)
    if not (folder / "whole").exists():
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            prepare(folder / "whole")
    end, number = time.monotonic() + 60 * minutes, first
    while time.monotonic() < end:
        rng, copy = random.Random(number), folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "whole", copy)
        kind = KINDS[number % len(KINDS)]
        print(json.dumps({"number": number, "kind": kind.__name__}), flush=True)
        try:
            kind(copy, rng, number)
        except (AssertionError, Flaky) as error:
            notes = "".join(traceback.format_exception(error.__cause__)[-3:]) if error.__cause__ else ""
            print(json.dumps({"failed": f"{error}"[:1500], "notes": notes[-1500:]}), flush=True)
        number += 1
    print(json.dumps({"end": number}), flush=True)


def main(config):
    first = int(time.time()) if config.seed is None else config.seed
    if config.worker:
        return work(Path(config.worker), first, config.minutes)
    end, number, cases, failures = time.monotonic() + 60 * config.minutes, first, {}, []
    with tempfile.TemporaryDirectory() as folder:
        while (left := end - time.monotonic()) > 0:
            command = [sys.executable, __file__, "--worker", folder, "--seed", str(number), "--minutes",
                       str(left / 60)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
            last, kind = "nothing yet", "?"
            for line in process.stdout:
                said = json.loads(line)
                number, kind = said.get("number", said.get("end", number)), said.get("kind", kind)
                if "case" in said:
                    cases[kind], last = cases.get(kind, 0) + 1, line.strip()
                if "failed" in said:
                    failures.append((number, kind, said["failed"]))
                    print(f"seed {number}, {kind}: {said['failed']}\n{said['notes']}", flush=True)
            if process.wait():  # it died of a case: told, and on with the next
                failures.append((number, kind, last))
                print(f"seed {number}, {kind}: the process ended with code {process.returncode} at "
                      f"{last[:1500]}\n"
                      + process.stderr.read()[-1500:], flush=True)
                number += 1
    print(f"{sum(cases.values())} cases from seed {first} on "
          f"({', '.join(f'{n} {kind}' for kind, n in cases.items())}): "
          f"{len(failures)} failures")
    if failures:
        raise InputError("one or more cases broke a promise; --seed <its seed> repeats it")


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
