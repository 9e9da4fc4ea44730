"""People grade clips in a browser, with keys only, and train_reward.py learns from their labels (A.2.3, Table
6).

    pip install -r requirements-label.txt               once: Flask
    python label.py clips                               serves a page on 127.0.0.1 until Ctrl-C
    python label.py clips --annotator ada               keeps ada's answers apart from other people's
    python label.py report clips                        counts, agreement between annotators, labels
    python label.py export clips --bad any              writes the majority's labels into the clips' metadata
    python label.py --pairs samples_base samples_prfl   asks which of two is better (Fig. 5); chance decides
                                                        which is on the left
    python label.py report samples_base                 how often its samples won, with 95 % intervals

`--help` lists the flags for clips; `report --help`, `export --help` and `--pairs A B --help` list theirs.

clips is a folder with metadata.jsonl or metadata.csv, as data.py reads and sample.py writes it. Answers are
lines of clips/labels.jsonl, or of pairs.jsonl in the first folder of a pair (formats/labels.py describes
them). Each answer is on the disk before the next clip is shown, so you can stop at any moment; the same
command continues. train_reward.py reads the answers there when it starts: nothing has to be exported or
encoded again. Each clip gets two grades, one for its motion and one for the form of its subject. From these
follows its label: good if both are qualified; bad if both are unqualified, or with --bad any if one is
(train_reward.py has this flag too); otherwise the clip is dropped. If several annotators grade a clip, it
gets the label that more than half of them give.

The page shows clips as training reads them: a clip that is interlaced or HDR, or that the browser does not
play, is shown as a converted copy.

To label on another machine than the one that runs this script, type `ssh -L 8765:127.0.0.1:8765 host` there,
where `host` runs the script, and open the printed address there.
"""
import contextlib
import getpass
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
except ImportError:                     # report and export work without Flask
    flask = None

import common
import data
import report
from common import InputError, arg
from formats import labels
from formats.metadata import printable, read_metadata, write_labels
from formats.paths import other_spelling
from formats.shards import join_equal
from formats.video import copy_for_browser, first_look

PAGE = Path(__file__).with_name("assets") / "label.html"
PAUSE = 120.0                           # seconds between two answers that count as a break, not as work
COPIES = 8                              # how many converted clips are kept while the page runs
BAD_HELP = ("which clips are bad: both: those unqualified on both axes, motion and form (the paper's A.2.3); "
            "any: those unqualified on at least one axis")


@dataclass(kw_only=True)
class Serve:
    annotator: str | None = arg(None, "name of the person whose answers these are; default: the login name")
    port: int = arg(8765, "port of the page on 127.0.0.1; 0 chooses a free one", at_least=0, at_most=65535)
    seed: int = arg(0, "seed of the order of the clips, which is the same for all annotators, and of which "
                    "clip of a pair is on the left", at_least=0)


@dataclass(kw_only=True)
class Clips(Serve):
    folder: str = arg(..., "folder with clips and metadata", positional=True)
    bad: str = arg("both", BAD_HELP, choices=labels.BAD)


@dataclass(kw_only=True)
class Pairs(Serve):
    pairs: tuple[str, ...] = arg(..., "two folders with clips of the same prompts, A and B")


@dataclass(kw_only=True)
class Said:
    folder: str = arg(..., "folder with labels.jsonl (or, for report, pairs.jsonl)", positional=True)
    bad: str = arg("both", BAD_HELP, choices=labels.BAD)


# ---- what is shown. An item is one clip or pair: {key, line: what is known of its answer before it is given,
# files: from left to right, show: what the page may know}.
def own_files(folder):
    """-> the rows of the metadata whose file exists, inside the folder. Prints how many rows are left out."""
    rows, root = read_metadata(folder), os.path.realpath(folder)
    where = lambda row: os.path.realpath(os.path.join(root, row["file_name"]))
    inside = [row for row in rows if where(row).startswith(root + os.sep)]
    there = [row for row in inside if os.path.isfile(where(row))]
    if len(rows) > len(inside):
        print(f"{folder}: {len(rows) - len(inside)} of {len(rows)} clips lie outside the folder: left out")
    if missing := [row["file_name"] for row in inside if row not in there]:
        print(f"{folder}: {len(missing)} of {len(rows)} clips have no file: left out")
        if hint := other_spelling(os.path.join(folder, missing[0])):
            print(printable(f"{missing[0]}: there is no such file{hint}"))
    if not there:
        raise InputError(f"{folder}: none of the clips in its metadata is there")
    return there


def clip_items(folder):
    items = {}
    for row in own_files(folder):
        name = row["file_name"]
        key = (os.path.normpath(name),)                         # a row that comes twice is one clip
        if key not in items:
            items[key] = {"key": key, "line": {"file_name": name}, "files": [Path(folder) / name],
                          "show": {"prompt": row["prompt"], "name": name}}
    return list(items.values())


def pair_items(folders, seed):
    """-> the items of two folders. A prompt's first clip in folder A is shown with its first clip in folder
    B, the second with the second, and so on. The seed decides which clip is on the left."""
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
    against, items = os.path.relpath(folders[1], folders[0]), []
    for i, place in enumerate(both):
        names = {"a": sides[0][place], "b": sides[1][place]}
        files = {"a": Path(folders[0]) / names["a"], "b": Path(folders[1]) / names["b"]}
        left, right = ("a", "b") if common.uniform(seed, "sides", 0, [i]).item() < 0.5 else ("b", "a")
        items.append({"key": (against, names["a"], names["b"]), "show": {"prompt": place[0]},
                      "line": {"against": against, "prompt": place[0], **names, "left": left},
                      "files": [files[left], files[right]]})
    return items


class Session:
    """One annotator's way through the shuffled items. Only answers are written to the journal and outlive the
    page. Skipped items come again at the end, or after a restart."""

    def __init__(self, kind, items, journal, annotator, seed=0, bad="both"):
        order = torch.randperm(len(items), generator=common.random_generator(seed, "label order"))
        self.items = [items[i] for i in order]
        self.kind, self.journal, self.annotator, self.bad = kind, journal, annotator, bad
        self.index = {item["key"]: i for i, item in enumerate(self.items)}
        self.answers = {}                             # item -> this annotator's last answer, oldest first
        answers, self.notes = labels.current_answers(journal.path, kind)
        for line in answers:
            key = (os.path.normpath(line["file_name"]),) if kind == "clip" else tuple(
                line[name] for name in labels.KEYS[kind])
            if line["annotator"] == annotator and key in self.index:
                self.answers[self.index[key]] = line
        self.skipped, self.again = [], []       # items to show at the end; items to show next, last one first
        self.gone = set()                       # items whose file was deleted
        self.looks = {}                         # item -> what `look` found
        self.lock = threading.Lock()            # the server has a thread for each request

    def coming(self, count):
        """-> the next `count` items to show, fewer at the end. Items whose file was deleted are left out."""
        found, moved = [], {*self.again, *self.skipped}
        fresh = (i for i in range(len(self.items)) if i not in moved)
        for i in (*self.again[::-1], *fresh, *self.skipped):
            if len(found) == count:
                break
            if i not in self.answers and i not in self.gone and self.here(i):
                found.append(i)
        return found

    def here(self, item):
        """Whether the item's files exist; if not, it is noted as gone."""
        there = all(os.path.isfile(path) for path in self.items[item]["files"])
        if not there:
            self.gone.add(item)
        return there

    def look(self, item):
        """-> [Facts of the first frame] of the item's files, None for a file that cannot be read."""
        if item not in self.looks:
            found = []
            for path in self.items[item]["files"]:
                try:
                    found.append(first_look(path))
                except InputError:
                    found.append(None)
            self.looks[item] = found
        return self.looks[item]

    def save(self, item, **said):
        line = said | {"annotator": self.annotator, "time": round(time.time(), 3)}
        self.journal.append(line)
        for places in (self.again, self.skipped):
            places[:] = [i for i in places if i != item]
        return line

    def answer(self, item, grades):
        line = self.items[item]["line"]
        line = self.save(item, **line, **grades, contents=labels.contents_beside(self.journal.path, line))
        self.answers.pop(item, None)
        self.answers[item] = line                               # popped before, so that it is now the last

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
        """-> answers per minute, from the latest 50 answers without breaks; None while there are too few."""
        times = [line.get("time", 0) for line in list(self.answers.values())[-50:]]
        gaps = [b - a for a, b in zip(times, times[1:]) if 0 < b - a < PAUSE]
        return 60 / statistics.mean(gaps) if len(gaps) >= 3 else None

    def state(self):
        """All that the page shows."""
        shown = []
        for item in self.coming(2):
            fps = [None if facts is None else facts.fps for facts in self.look(item)]
            shown.append(self.items[item]["show"] | {"id": item, "fps": fps})
        now, following, *_ = [*shown, None, None]
        return {"kind": self.kind, "annotator": self.annotator, "folder": str(self.journal.path.parent),
                "rate": self.rate(), "done": len(self.answers), "total": len(self.items) - len(self.gone),
                "skipped": len(self.skipped), "gone": len(self.gone), "now": now, "next": following,
                "tables": self.tables() if now is None else []}

    def tables(self):
        answers, _ = labels.current_answers(self.journal.path, self.kind)
        return clip_tables(answers, self.bad) if self.kind == "clip" else pair_tables(answers)


# ---- what is reported: tables (title, head, rows)
def clip_tables(answers, bad):
    """How often each annotator gave each grade, the majority's labels, and agreement between annotators."""
    people, rows = sorted({answer["annotator"] for answer in answers}), []
    for who in people:
        mine = [answer for answer in answers if answer["annotator"] == who]
        row = [who, len(mine)]
        for axis in labels.AXES:
            given = [answer[axis] for answer in mine]
            row.append(f"{given.count(2)} / {given.count(1)} / {given.count(0)}")
        rows.append(row)
    head = ["annotator", "clips", *(f"{axis}: qualified / partially / un-" for axis in labels.AXES)]
    votes = list(labels.majority(answers, bad).values())
    counts = [votes.count(1), votes.count(0), votes.count(None)]
    tables = [("Answers", head, rows),
              (f"Labels (bad: unqualified on {bad})", ["good", "bad", "dropped"], [counts])]
    if len(people) > 1:
        found, rows = labels.agreement(answers, bad), []
        for pair in found["label"]:
            row = ["all (Fleiss)" if pair == "all" else f"{pair[0]} and {pair[1]} (Cohen)"]
            for what in found:
                kappa, n = found[what][pair]
                row.append(f"- ({n})" if kappa is None else f"{kappa:.2f} ({n})")
            rows.append(row)
        tables.append(("Agreement: kappa (clips that both, or at least two, graded)", ["", *found], rows))
    return tables


def pair_tables(answers):
    """How often A wins, ties and loses against each other folder: for each pair the shares of its annotators,
    then the mean over pairs."""
    rows = []
    for against in sorted({answer["against"] for answer in answers}):
        mine = [answer for answer in answers if answer["against"] == against]
        win, tie, lose = labels.preference(mine).T                                          # each [n pairs]
        row = [against, len(mine), len(win), len({answer["annotator"] for answer in mine})]
        for values, sign in ((win, ""), (tie, ""), (lose, ""), (win - lose, "+")):
            row.append(report.show(values.mean(), report.confidence_interval(values[None]), sign))
        rows.append(row)
    return [("A against B (95 % intervals from resampled pairs)",
             ["B", "answers", "pairs", "annotators", "A wins", "tie", "A loses", "wins - losses"], rows)]


def show_tables(tables):
    lines = []
    for title, head, rows in tables:
        lines += [f"{title}\n", *report.table(head, [[printable(cell) for cell in row] for row in rows])]
    return "\n".join(lines)


# ---- the page
class Copies:
    """Copies of clips in a form that browsers play. Each copy is made once, however many requests ask for it
    at the same time. The latest COPIES are kept in the folder."""

    def __init__(self, folder):
        self.folder, self.count = Path(folder), 0
        self.made = {}                          # (path, its time and size) -> copy, or why there is no copy
        self.turns = {}                         # (path, its time and size) -> a lock
        self.lock = threading.Lock()

    def of(self, source):
        """-> path of the copy. Raises InputError if `source` cannot be read, OSError if a copy cannot be
        written."""
        found = source.stat()
        key = source, found.st_mtime_ns, found.st_size
        with self.lock:
            turn = self.turns.setdefault(key, threading.Lock())
        with turn:                              # one request converts, the others wait here
            if key not in self.made:
                self.convert(key)
            copy = self.made[key]
        if isinstance(copy, InputError):
            raise copy
        return copy

    def convert(self, key):
        with self.lock:
            self.count += 1
            copy = self.folder / f"{self.count}.mp4"
        try:
            copy_for_browser(key[0], copy)
        except InputError as error:
            copy = error
        with self.lock:
            self.made[key] = copy
            for old in [*self.made][:-COPIES]:
                del self.turns[old]
                if isinstance(forgotten := self.made.pop(old), Path):
                    forgotten.unlink(missing_ok=True)


def make_app(session, token, scratch):
    """The Flask application. Every address begins with the token. Clips are reached by their number in the
    list, so no other file can be asked for. scratch: a folder for converted copies of clips."""
    app, copies = flask.Flask("label", static_folder=None), Copies(scratch)
    refuse = lambda code, text: flask.Response(f"{text}\n", code, mimetype="text/plain")

    @app.before_request
    def only_who_was_told():
        host = flask.request.host.rsplit(":", 1)[0]     # a web site could call 127.0.0.1 by another name
        given = (flask.request.view_args or {}).pop("token", "")
        known = secrets.compare_digest(given.encode(), token.encode())
        if host not in ("127.0.0.1", "localhost") or not known:
            return refuse(403, "This is not the address that label.py printed when it was last started.")

    @app.after_request
    def close_doors(response):
        policy = "default-src 'self' 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
        response.headers.update({"Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
                                 "Cache-Control": "no-store", "Content-Security-Policy": policy})
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
        # The page asks for an mp4 if the browser does not play the file. Without being asked, a file is
        # converted if the browser would not show it as training reads it.
        facts = session.look(item)[side]
        otherwise = facts is not None and (facts.interlaced > 0 or facts.colours == "converted")
        try:
            if otherwise or flask.request.args.get("as") == "mp4":
                path = copies.of(path)
        except InputError as e:
            return refuse(415, e)
        except OSError as e:
            return refuse(507, f"{scratch}: {e.strerror or e}")
        return flask.send_file(path.absolute(), conditional=True)       # ranges, so that seeking works

    def read(given):
        """-> item and grades from a request's JSON; no grades mean that the item is skipped. Raises KeyError,
        TypeError or ValueError."""
        item, line = given["id"], session.items[given["id"]]["line"]
        if item < 0:
            raise ValueError
        if given.get("skip"):
            return item, {}
        if session.kind == "clip":
            rules, grades = labels.CLIP_RULES, {axis: given[axis] for axis in labels.AXES}
        else:                                                   # the page does not know which folder is left
            sides = {"left": line["left"], "tie": "tie", "right": "b" if line["left"] == "a" else "a"}
            rules, grades = labels.PAIR, {"winner": sides[given["winner"]]}
        if not all(rules[name](grade) for name, grade in grades.items()):
            raise ValueError
        return item, grades

    @app.post("/<token>/answer")
    def answer():
        with session.lock:
            try:
                item, grades = read(flask.request.get_json(silent=True))
                if grades:
                    session.answer(item, grades)
                else:
                    session.skip(item)
            except (LookupError, TypeError, ValueError):
                return refuse(400, "not an answer")
            except OSError as e:
                return refuse(507, f"{session.journal.path}: {e.strerror or e}")
            return session.state()

    @app.post("/<token>/undo")
    def undo():
        with session.lock:
            try:
                # if the reply was lost, the page sends the request again; still only one answer is taken back
                given = flask.request.get_json(silent=True) or {}
                if session.answers and given.get("done") == len(session.answers):
                    session.undo()
            except OSError as e:
                return refuse(507, f"{session.journal.path}: {e.strerror or e}")
            return session.state()

    return app


def listen(port):
    """-> a socket that only 127.0.0.1 reaches. Raises InputError if the port is taken."""
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)     # so that a restart need not wait
    try:
        found.bind(("127.0.0.1", port))
        found.listen(128)
    except OSError as e:
        raise InputError(f"--port {port}: {e.strerror.lower()}: pass another one (0: any free one)") from None
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
    with tempfile.TemporaryDirectory(prefix="label-", ignore_cleanup_errors=True) as scratch:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        app, address = make_app(session, token, scratch), listening.getsockname()
        server = make_server(*address, app, threaded=True, fd=listening.fileno())
        with contextlib.suppress(KeyboardInterrupt):
            print(f"{len(items)} {kind}s, {len(session.answers)} answered by {printable(annotator)}\n"
                  f"open http://127.0.0.1:{address[1]}/{token}/\n"
                  f"answers go to {journal.path}; Ctrl-C ends", flush=True)
            server.serve_forever()
    print(f"\n{len(session.answers)} of {len(items)} {kind}s answered by {printable(annotator)}: "
          f"{journal.path}\n")
    print(show_tables(session.tables()))


# ---- the other commands
def report_command(config):
    folder = Path(config.folder)
    clips, notes = labels.current_answers(folder / "labels.jsonl", "clip")
    pairs, more = labels.current_answers(folder / "pairs.jsonl", "pair")
    notes += more
    if not clips and not pairs:
        raise InputError("; ".join([f"{folder}: no answers in a labels.jsonl or pairs.jsonl: `python "
                                    f"label.py {folder}`", *notes]))
    common.refuse(config, () if clips else ("bad",), "for pairs")
    tables = clip_tables(clips, config.bad) if clips else []
    if pairs:
        tables += pair_tables(pairs)
    print(show_tables(tables))
    if clips:
        print(describe_clips(folder, clips))
    for note in notes:
        print(printable(note))


def describe_clips(folder, answers):
    """A sentence that counts copies, and clips of one prompt, among the clips that have answers."""
    answers = list({os.path.normpath(answer["file_name"]): answer for answer in answers}.values())
    prompts = {}
    with contextlib.suppress(InputError):                       # the folder of the answers may have no list
        prompts = {os.path.normpath(row["file_name"]): row["prompt"] for row in read_metadata(folder)}
    contents = [content for content, in labels.all_contents(folder / "labels.jsonl", answers)]
    names = [os.path.normpath(answer["file_name"]) for answer in answers]
    groups = data.prompt_groups([prompts.get(name, name) for name in names])
    return data.count_relatives(join_equal(contents), groups)


def export_command(config):
    """Writes the majority's labels into the clips' metadata and changes no other byte. Clips without answers
    keep their labels; a clip loses its label if none was given by more than half of its annotators."""
    folder = Path(config.folder)
    rows = read_metadata(folder)            # raises InputError for a bad row, before anything is written
    answers, notes = labels.current_answers(folder / "labels.jsonl")
    if not answers:
        raise InputError(
            "; ".join([f"{folder}/labels.jsonl: no answers: `python label.py {folder}`", *notes]))
    found = labels.majority(answers, config.bad)
    path = write_labels(folder, found)
    names = {os.path.normpath(row["file_name"]) for row in rows}
    votes = [label for name, label in found.items() if name in names]
    print(f"wrote {path}: {votes.count(1)} good, {votes.count(0)} bad, {votes.count(None)} dropped, "
          f"{len(names) - len(votes)} without answers left as they were")
    if len(found) > len(votes):
        print(f"{len(found) - len(votes)} answered clips are not in it")
    for note in notes:
        print(printable(note))


COMMANDS = {"report": (report_command, Said), "export": (export_command, Said)}

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        common.cli(*COMMANDS[words[0]], __doc__, words[1:], f"label.py {words[0]}")
    else:
        common.cli(serve, Pairs if "--pairs" in words else Clips, __doc__, words)
