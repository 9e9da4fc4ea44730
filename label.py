"""People grade clips in a browser, by keys alone: the labels that train_reward.py learns from (A.2.3, Table 6).

    pip install -r requirements-label.txt                        once: Flask
    python label.py clips                                        a page on 127.0.0.1; Ctrl-C ends it
    python label.py clips --annotator ada                        each person's answers are kept apart
    python label.py report clips                                 counts, agreement between annotators, labels
    python label.py export clips --bad any                       writes the majority's labels into the clips' metadata
    python label.py --pairs samples_base samples_prfl            which of two is better? blind, sides by chance (Fig. 5)
    python label.py report samples_base                          how often it won, with 95 % intervals

clips is a folder with metadata.jsonl or .csv, as data.py and sample.py read and write it. Answers are lines of
clips/labels.jsonl, or of pairs.jsonl in the first folder of a pair (formats/labels.py has the format). Each is on the disk
before the next clip shows, so any moment is a good one to stop, and the same command goes on. train_reward.py reads them there
at start: nothing has to be exported or encoded again. Two grades make a label: good if qualified on both axes, bad if
unqualified on both (--bad any: on one; train_reward.py has the flag too), else the clip is dropped. Of several annotators
more than half decide.

From another machine: `ssh -L 8765:127.0.0.1:8765 host`, then open the printed address here.
"""
import contextlib
import csv
import getpass
import json
import logging
import os
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import flask
    from werkzeug.serving import make_server
except ImportError:                     # an extra: report and export do without
    flask = None

import common
import data
import report
from common import InputError, arg
from formats import disk, labels
from formats.metadata import FIELDS, find_metadata, printable
from formats.video import read_clip, write_video

PAGE = Path(__file__).with_name("assets") / "label.html"
PAUSE = 120.0                           # seconds between two answers that count as a break, not as work
BAD = "bad is: unqualified on both axes (A.2.3), or on any"


@dataclass(kw_only=True)
class Serve:
    annotator: str | None = arg(None, "whose answers these are; without, the login name")
    port: int = arg(8765, "of 127.0.0.1; 0 takes any free one", at_least=0, at_most=65535)
    seed: int = arg(0, "of the order, the same for every annotator, and of the sides of pairs", at_least=0)


@dataclass(kw_only=True)
class Clips(Serve):
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    bad: str = arg("both", BAD, choices=labels.BAD)


@dataclass(kw_only=True)
class Pairs(Serve):
    pairs: tuple[str, ...] = arg(..., "two folders with clips of the same prompts: A B")


@dataclass(kw_only=True)
class Said:
    folder: str = arg(..., "folder with labels.jsonl (or, for report, pairs.jsonl)", positional=True)
    bad: str = arg("both", BAD, choices=labels.BAD)


# ---- what is shown: items {key, line: the answer's fixed part, files: from left to right, show: what the page may know}
def own_files(folder):
    """-> rows of the metadata whose file is there, within the folder; how many are not is told."""
    rows, root = data.read_metadata(folder), os.path.realpath(folder)
    where = lambda row: os.path.realpath(os.path.join(root, row["file_name"]))
    inside = [row for row in rows if where(row).startswith(root + os.sep)]
    there = [row for row in inside if os.path.isfile(where(row))]
    for count, why in ((len(rows) - len(inside), "lie outside the folder"), (len(inside) - len(there), "have no file")):
        if count:
            print(f"{folder}: {count} of {len(rows)} clips {why}: left out")
    if not there:
        raise InputError(f"{folder}: none of the clips in its metadata is there")
    return there


def clip_items(folder):
    items = {}
    for row in own_files(folder):
        key = (os.path.normpath(row["file_name"]),)             # a row that comes twice is one clip
        items.setdefault(key, {"key": key, "line": {"file_name": row["file_name"]}, "files": [Path(folder) / row["file_name"]],
                               "show": {"prompt": row["prompt"], "name": row["file_name"]}})
    return list(items.values())


def pair_items(folders, seed):
    """The first clip of a prompt in A is shown with the first one in B, the second with the second, and so on."""
    sides = []
    for folder in folders:
        found, count = {}, {}
        for row in own_files(folder):
            prompt = row["prompt"]
            count[prompt] = count.get(prompt, 0) + 1
            found[prompt, count[prompt]] = row["file_name"]
        sides.append(found)
    both = [place for place in sides[0] if place in sides[1]]
    if not both:
        raise InputError(f"--pairs {' '.join(folders)}: no prompt is in both folders")
    if alone := sum(map(len, sides)) - 2 * len(both):
        print(f"{alone} clips have no partner of the same prompt: left out")
    against, items = os.path.relpath(*folders[::-1]), []
    for i, place in enumerate(both):
        names = {"a": sides[0][place], "b": sides[1][place]}
        order = "ab" if common.uniform(seed, "sides", 0, [i]).item() < 0.5 else "ba"
        items.append({"key": (against, names["a"], names["b"]), "show": {"prompt": place[0]},
                      "line": {"against": against, "prompt": place[0], **names, "left": order[0]},
                      "files": [Path(folders["ab".index(side)]) / names[side] for side in order]})
    return items


class Session:
    """One annotator's way through shuffled items. What must last is in the journal; what was skipped comes again at the end,
    or after a restart."""

    def __init__(self, kind, items, journal, annotator, seed=0, bad="both"):
        order = torch.randperm(len(items), generator=common.random_generator(seed, "label order"))
        self.items = [items[i] for i in order]
        self.kind, self.journal, self.annotator, self.bad = kind, journal, annotator, bad
        self.index = {item["key"]: i for i, item in enumerate(self.items)}
        self.answers = {}                                       # item -> this annotator's standing answer, oldest first
        for line in labels.read_answers(journal.path, kind):
            key = (os.path.normpath(line["file_name"]),) if kind == "clip" else tuple(line[name] for name in labels.KEYS[kind])
            if line["annotator"] == annotator and key in self.index:
                self.answers[self.index[key]] = line
        self.skipped, self.again, self.gone = [], [], set()
        self.lock = threading.Lock()                            # the server has a thread for each request

    def coming(self, count):
        """-> the next `count` items to show, fewer at the end; those whose file has gone meanwhile are left out."""
        found, moved = [], {*self.again, *self.skipped}
        fresh = (i for i in range(len(self.items)) if i not in moved)
        for i in (*self.again[::-1], *fresh, *self.skipped):
            if len(found) == count:
                break
            if i not in self.answers and i not in self.gone:
                found.extend([i] * self.here(i))
        return found

    def here(self, item):
        there = all(os.path.isfile(path) for path in self.items[item]["files"])
        self.gone.update([item] * (not there))
        return there

    def save(self, item, **said):
        line = said | {"annotator": self.annotator, "time": round(time.time(), 3)}
        self.journal.append(line)
        for places in (self.again, self.skipped):
            places[:] = [i for i in places if i != item]
        return line

    def answer(self, item, grades):
        line = self.save(item, **self.items[item]["line"], **grades)
        self.answers.pop(item, None)
        self.answers[item] = line                               # the latest is the last

    def undo(self):
        """Takes the latest answer back and shows its item again."""
        item = next(reversed(self.answers))
        self.save(item, **{name: self.answers[item][name] for name in labels.KEYS[self.kind]}, retracted=True)
        del self.answers[item]
        self.again.append(item)

    def skip(self, item):
        for places in (self.again, self.skipped):
            places[:] = [i for i in places if i != item]
        if item not in self.gone | set(self.answers) and self.here(item):
            self.skipped.append(item)

    def rate(self):
        """-> answers a minute, of the latest 50, breaks left out; None before there are some."""
        times = [line.get("time", 0) for line in list(self.answers.values())[-50:]]
        gaps = [b - a for a, b in zip(times, times[1:]) if 0 < b - a < PAUSE]
        return 60 / statistics.mean(gaps) if len(gaps) >= 3 else None

    def state(self):
        """All that the page shows."""
        now, following, *_ = [*self.coming(2), None, None]
        show = lambda i: None if i is None else self.items[i]["show"] | {"id": i}
        return {"kind": self.kind, "annotator": self.annotator, "folder": str(self.journal.path.parent), "rate": self.rate(),
                "done": len(self.answers), "total": len(self.items) - len(self.gone), "skipped": len(self.skipped),
                "gone": len(self.gone), "now": show(now), "next": show(following),
                "tables": self.tables() if now is None else []}

    def tables(self):
        answers = labels.read_answers(self.journal.path, self.kind)
        return clip_tables(answers, self.bad) if self.kind == "clip" else pair_tables(answers)


# ---- what is reported: tables (title, head, rows)
def clip_tables(answers, bad):
    """What each annotator said, the majority's labels, and agreement."""
    people, rows = sorted({answer["annotator"] for answer in answers}), []
    for who in people:
        mine = [answer for answer in answers if answer["annotator"] == who]
        count = lambda axis, grade: str(sum(answer[axis] == grade for answer in mine))
        rows.append([who, len(mine), *(" / ".join(count(axis, grade) for grade in (2, 1, 0)) for axis in labels.AXES)])
    head = ["annotator", "clips", *(f"{axis}: qualified / partially / un-" for axis in labels.AXES)]
    votes = list(labels.majority(answers, bad).values())
    tables = [("Answers", head, rows), (f"Labels (bad: unqualified on {bad})", ["good", "bad", "dropped"],
                                        [[votes.count(label) for label in (1, 0, None)]])]
    if len(people) > 1:
        found = labels.agreement(answers, bad)
        cell = lambda kappa, n: f"{'-' if kappa is None else f'{kappa:.2f}'} ({n})"
        name = lambda pair: "all (Fleiss)" if pair == "all" else f"{pair[0]} and {pair[1]} (Cohen)"
        tables.append(("Agreement: kappa (clips that both, or at least two, graded)", ["", *found],
                       [[name(pair), *(cell(*found[what][pair]) for what in found)] for pair in found["label"]]))
    return tables


def pair_tables(answers):
    """Win, tie and lose of A against each other folder: means over pairs of the annotators' shares."""
    rows = []
    for against in sorted({answer["against"] for answer in answers}):
        mine = [answer for answer in answers if answer["against"] == against]
        win, tie, lose = labels.preference(mine).T                                                  # each [n pairs]
        show = lambda x, sign="": report.show(x.mean(), report.confidence_interval(x[None]), sign)
        rows.append([against, len(mine), len(win), len({answer["annotator"] for answer in mine}),
                     show(win), show(tie), show(lose), show(win - lose, "+")])
    return [("A against B (95 % intervals from resampled pairs)",
             ["B", "answers", "pairs", "annotators", "A wins", "tie", "A loses", "wins - losses"], rows)]


def show_tables(tables):
    text = lambda row: [printable(cell) for cell in row]
    return "\n".join(line for title, head, rows in tables for line in (f"{title}\n", *report.table(head, map(text, rows))))


# ---- the page
def make_app(session, token, scratch):
    """The Flask application. Every address begins with the token. Clips are reached by their number in the list, so no other
    file can be asked for. scratch: a folder for copies of clips that the browser cannot play."""
    app = flask.Flask("label", static_folder=None)
    refuse = lambda code, text: flask.Response(f"{text}\n", code, mimetype="text/plain")

    @app.before_request
    def only_who_was_told():
        host = flask.request.host.rsplit(":", 1)[0]             # another name for 127.0.0.1 is another site's trick
        given = (flask.request.view_args or {}).pop("token", "")
        if host not in ("127.0.0.1", "localhost") or not secrets.compare_digest(given.encode(), token.encode()):
            return refuse(403, "This is not the address that label.py printed when it was last started.")

    @app.after_request
    def close_doors(response):
        response.headers.update({"Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
                                 "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:; "
                                                            "frame-ancestors 'none'"})
        return response

    @app.get("/<token>/")
    def page():
        return flask.Response(PAGE.read_text(encoding="utf-8"), mimetype="text/html")

    @app.get("/<token>/state")
    def state():
        with session.lock:
            return session.state()

    @app.get("/<token>/clip/<int:item>/<int:side>")
    def clip(item, side):
        files = session.items[item]["files"] if item < len(session.items) else []
        path = files[side] if side < len(files) else None
        if not path or not path.is_file():
            return refuse(410, "gone")
        if flask.request.args.get("as") == "mp4":               # a codec or container that the browser does not play
            copy = Path(scratch) / f"{item}-{side}.mp4"
            try:
                if not copy.exists():
                    write_video(copy, *read_clip(path))
            except InputError as e:
                return refuse(415, e)
            path = copy
        return flask.send_file(path.absolute(), conditional=True)       # ranges, so that seeking works

    def read(given):
        """-> item, grades (None to skip) of a request's JSON. Raises KeyError, TypeError or ValueError."""
        item, line = given["id"], session.items[given["id"]]["line"]
        if session.kind == "clip":
            rules, grades = labels.CLIP_RULES, {axis: given[axis] for axis in labels.AXES if not given.get("skip")}
        else:                                                   # the page knows sides alone
            sides = {"left": line["left"], "tie": "tie", "right": "ba"["ab".index(line["left"])]}
            rules, grades = labels.PAIR, {} if given.get("skip") else {"winner": sides[given["winner"]]}
        if item < 0 or not all(rules[name](grade) for name, grade in grades.items()):
            raise ValueError
        return item, grades

    @app.post("/<token>/answer")
    def answer():
        with session.lock:
            try:
                item, grades = read(flask.request.get_json(silent=True))
                session.answer(item, grades) if grades else session.skip(item)
            except (LookupError, TypeError, ValueError):
                return refuse(400, "not an answer")
            except OSError as e:
                return refuse(507, f"{session.journal.path}: {e.strerror or e}")
            return session.state()

    @app.post("/<token>/undo")
    def undo():
        with session.lock:
            try:                        # a request that is sent again, as its reply was lost, takes back one answer all the same
                if session.answers and (flask.request.get_json(silent=True) or {}).get("done") == len(session.answers):
                    session.undo()
            except OSError as e:
                return refuse(507, f"{session.journal.path}: {e.strerror or e}")
            return session.state()

    return app


def listen(port):
    """-> a socket of 127.0.0.1 alone. Raises InputError if the port is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)         # a restart need not wait for old connections
    try:
        found.bind(("127.0.0.1", port))
        found.listen(128)
    except OSError as e:
        raise InputError(f"--port {port}: {e.strerror.lower()}: pass another one (0 takes any that is free)") from None
    return found


def serve(config):
    kind = "pair" if isinstance(config, Pairs) else "clip"
    if flask is None:
        raise InputError("label.py shows its page with Flask: pip install -r requirements-label.txt")
    if kind == "pair" and len(config.pairs) != 2:
        raise InputError(f"--pairs takes two folders, got {len(config.pairs)}")
    try:
        annotator = (getpass.getuser() if config.annotator is None else config.annotator).strip()
    except (KeyError, OSError):                                 # a user without a name, as in some containers
        annotator = ""
    if not annotator:
        raise InputError("--annotator is empty: pass a name")
    items = pair_items(config.pairs, config.seed) if kind == "pair" else clip_items(config.folder)
    folder, listening = Path(config.pairs[0] if kind == "pair" else config.folder), listen(config.port)
    journal = labels.Journal(folder / f"{'pairs' if kind == 'pair' else 'labels'}.jsonl")
    session = Session(kind, items, journal, annotator, config.seed, getattr(config, "bad", "both"))
    token = secrets.token_urlsafe(12)
    with tempfile.TemporaryDirectory(prefix="label-") as scratch:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app, address = make_app(session, token, scratch), listening.getsockname()
        server = make_server(*address, app, threaded=True, fd=listening.fileno())
        with contextlib.suppress(KeyboardInterrupt):
            print(f"{len(items)} {kind}s, {len(session.answers)} answered by {printable(annotator)}\n"
                  f"open http://127.0.0.1:{address[1]}/{token}/\nanswers go to {journal.path}; Ctrl-C ends", flush=True)
            server.serve_forever()
    print(f"\n{len(session.answers)} of {len(items)} {kind}s answered by {printable(annotator)}: {journal.path}\n")
    print(show_tables(session.tables()))


# ---- the other commands
def report_command(config):
    clips, pairs = (labels.read_answers(Path(config.folder) / f"{kind}.jsonl", kind.removesuffix("s").replace("label", "clip"))
                    for kind in ("labels", "pairs"))
    if not clips and not pairs:
        raise InputError(f"{config.folder}: no answers in a labels.jsonl or pairs.jsonl: `python label.py {config.folder}`")
    common.refuse(config, () if clips else ("bad",), "for pairs")
    print(show_tables((clip_tables(clips, config.bad) if clips else []) + (pair_tables(pairs) if pairs else [])))


def relabel(row, found):
    """A metadata row as it was read -> with its label in `found`, or as it is if the clip has none there."""
    fields = {str(name).strip().lower(): name for name in row}
    name = next(row[fields[field]] for field in FIELDS["file_name"] if row.get(fields.get(field)))
    name, column = os.path.normpath(name), next((fields[x] for x in FIELDS["label"] if x in fields), "label")
    if name not in found:
        return row
    return row | {fields[x]: None for x in FIELDS["label"] if x in fields} | {column: found[name]}


def export_command(config):
    """Writes the majority's labels into the metadata. Other fields, and rows of clips without answers, stay; what is dropped
    loses its label."""
    folder = Path(config.folder)
    found = labels.majority(labels.read_answers(folder / "labels.jsonl"), config.bad)
    rows = data.read_metadata(folder)                                           # every row can be used
    if not found:
        raise InputError(f"{folder}/labels.jsonl: no answers: `python label.py {folder}`")
    path = find_metadata(folder)
    temporary = Path(f"{path}.tmp")
    with path.open(encoding="utf-8-sig", newline="") as old, temporary.open("w", encoding="utf-8", newline="") as new:
        if path.suffix.lower() == ".csv":
            changed = [relabel(row, found) for row in csv.DictReader(old)]
            writer = csv.DictWriter(new, list(dict.fromkeys(name for row in changed for name in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(changed)
        else:
            for line in old:
                row = json.loads(line) if line.strip() else {}
                changed = relabel(row, found) if row else row
                new.write(line if changed == row else json.dumps(changed, ensure_ascii=False) + "\n")
    disk.put(temporary, path)
    names = {os.path.normpath(row["file_name"]) for row in rows}
    votes = [label for name, label in found.items() if name in names]
    print(f"wrote {path}: {votes.count(1)} good, {votes.count(0)} bad, {votes.count(None)} dropped, "
          f"{len(names) - len(votes)} without answers left as they were")
    if len(found) > len(votes):
        print(f"{len(found) - len(votes)} answered clips are not in it")


COMMANDS = {"report": (report_command, Said), "export": (export_command, Said)}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        common.cli(*COMMANDS[words[0]], __doc__, words[1:], f"label.py {words[0]}")
    else:
        common.cli(serve, Pairs if "--pairs" in words else Clips, __doc__, words)
