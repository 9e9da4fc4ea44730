"""What people said about clips: files of JSON lines that lie beside the clips and only ever grow (label.py
writes them).

    clips/labels.jsonl   {"file_name": "a.mp4", "annotator": "ada", "physical": 2, "deformity": 1,
                          "contents": ["0f3c..."],
                          "time": 1764070000.25}
    clips/pairs.jsonl    {"against": "../sft", "prompt": "...", "a": "a.mp4", "b": "c.mp4", "left": "b",
                          "winner": "a",
                          "annotator": "ada", "contents": ["0f3c...", "9ab0..."], "time": ...}

physical (plausibility) and deformity (of the subject) are graded 0 unqualified, 1 partially qualified, 2
qualified (A.2.3, Table 6). If an annotator has several lines about a clip or a pair, the last one counts.
Undo adds a line with "retracted": true, so no answer is ever lost. time: seconds since 1970.

contents: fingerprints of the clip's file, or of those of a and b, when the answer was given
(formats/fingerprint.py). If another film later gets the same name, the answers about the old one no longer
count. Lines without contents always count.

Axes: n clips, k categories, m annotators.
"""
import collections
import contextlib
import itertools
import json
import os
from pathlib import Path

import numpy as np

from common import InputError
from formats import disk, fingerprint, lock
from formats.metadata import from_json

AXES = ("physical", "deformity")
BAD = ("both", "any")           # a clip is bad if it is unqualified on both axes (A.2.3), or on any axis
KEYS = {"clip": ("file_name",), "pair": ("against", "a", "b")}


def _is_text(value):
    return isinstance(value, str)


def _is_name(value):
    return isinstance(value, str) and value != ""


def _is_grade(value):
    return type(value) is int and value in (0, 1, 2)    # True and 1.0 are not grades


def _is_winner(value):
    return value in ("a", "tie", "b")


CLIP_RULES = {"file_name": _is_name, "physical": _is_grade, "deformity": _is_grade}
PAIR = {"against": _is_text, "prompt": _is_text, "a": _is_text, "b": _is_text, "winner": _is_winner}


# ---- the files
class Journal:
    """A file of JSON lines with one writer at a time; a line is on the disk when `append` returns.

    Raises InputError if another process writes it.
    """

    def __init__(self, path):
        self.path = Path(path)
        is_new = not self.path.exists()
        self.file = self.path.open("a+b", buffering=0)
        if not lock.take(self.file, self.path.parent):
            raise InputError(f"{self.path.parent}: another label.py has this folder open: stop that one "
                             f"first")
        if is_new:                                                  # the file's name has to be on the disk
            disk.flush(self.path.parent)
        content = self.path.read_bytes()
        tail = content[content.rfind(b"\n") + 1:]
        if tail and _is_json(tail):
            self.file.write(b"\n")
        elif tail:  # a kill or a full disk cut this line short, before anybody was told that it is saved
            self.file.truncate(len(content) - len(tail))

    def append(self, line):
        """Adds a line. If it cannot be saved, raises OSError and leaves the file as it was."""
        before = os.fstat(self.file.fileno()).st_size
        data = (json.dumps(line) + "\n").encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError("the disk is full")
            disk.flush_handle(self.file.fileno(), self.path)
        except OSError:
            self.file.truncate(before)
            raise


def _is_json(line):
    try:
        return from_json(line) is not None
    except ValueError:
        return False


def read_answers(path, kind="clip"):
    """-> the answers that stand in a labels.jsonl (kind "clip") or pairs.jsonl ("pair"), oldest first,
    whatever their clips hold now; [] if there is no such file. An answer stands if it is its annotator's last
    one about the clip or pair, and was not retracted. Raises InputError, which names the first line that is
    not an answer; a last line that a kill cut short does not count."""
    return _standing(_read_lines(path, kind), kind)


def current_answers(path, kind="clip", contents_of=None):
    """-> (the answers that stand and were given for what their clips hold now, oldest first; [notes to
    print]).

    contents_of(answer): fingerprints of what the answer's files hold now, or None where that is not known
    (such an answer counts); default: the files beside `path` are read. Raises InputError as `read_answers`
    does. """
    path, lines = Path(path), _read_lines(path, kind)
    sure = [line for line in lines if line.get("contents") is not None]
    found = all_contents(path, sure) if contents_of is None else [contents_of(line) for line in sure]
    stale_lines = {id(line) for line, now in zip(sure, found) if not _is_current(line["contents"], now)}
    current = [line for line in lines if id(line) not in stale_lines]
    answers, every = _standing(current, kind), _standing(lines, kind)
    stale = len(every) - len({_key(line, kind) for line in every} & {_key(line, kind) for line in answers})
    silent = sum(line.get("contents") is None for line in answers)
    notes = []
    if stale:
        notes.append(f"{path}: {stale} of {len(every)} answers were given for other content under the same "
                     "name: not used, "
                     "and label.py asks again")
    if silent:
        notes.append(f"{path}: {silent} of {len(every)} answers, from an older label.py, do not say for "
                     "which content they "
                     "were given: they count")
    return answers, notes


def contents_beside(path, answer, content=fingerprint.of_file):
    """-> [content(file) of each file that an answer in the file `path` is about, or None where it cannot be
    read]."""
    if "file_name" in answer:
        names = [answer["file_name"]]
    else:
        names = [answer["a"], os.path.join(answer["against"], answer["b"])]
    found = []
    for name in names:
        try:
            found.append(content(os.path.normpath(os.path.join(Path(path).parent, name))))
        except (OSError, ValueError):
            found.append(None)
    return found


def all_contents(path, answers):
    """-> [`contents_beside` of each of the answers in the file `path`]. A file that was read before and has
    not changed is not read again, because .contents.json beside `path` keeps its fingerprint."""
    known = fingerprint.Contents(Path(path).parent / ".contents.json")
    found = [contents_beside(path, answer, known.content) for answer in answers]
    if known.fresh:
        # if the folder cannot be written in, the files are read again next time
        with contextlib.suppress(OSError):
            known.save()
    return found


def _is_current(given, now):
    """Whether an answer's files still hold the contents that it was given for. Unknown contents count as the
    same."""
    return all(old == new or old is None or new is None for old, new in zip(given, now))


def _read_lines(path, kind):
    """-> the lines of a file of answers, in order. Raises InputError, which names the first line that is not
    an answer."""
    try:
        texts = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for number, text in enumerate(texts, 1):
        is_cut_short = number == len(texts) and not _is_json(text)
        if not text.strip() or is_cut_short:
            continue
        try:
            line = from_json(text)
            wrong = _wrong_field(line, kind)
        except (ValueError, AttributeError):
            raise InputError(f"{path} line {number}: not a JSON object: mend or remove that line") from None
        if wrong:
            remedy = "mend or remove that line"
            if "label" in line:
                remedy = "it holds answers of label.py; a label of your own goes into the clips' metadata"
            raise InputError(f"{path} line {number}: {wrong} is {line.get(wrong)!r}: {remedy}")
        lines.append(line)
    return lines


def _wrong_field(line, kind):
    """The name of the first field of an answer that breaks its rule, or None."""
    rules = {"annotator": _is_name} | (CLIP_RULES if kind == "clip" else PAIR)
    for name, rule in rules.items():
        is_wanted = name == "annotator" or name in KEYS[kind] or not line.get("retracted")
        if is_wanted and not rule(line.get(name)):
            return name
    contents = line.get("contents")
    if contents is None:
        return None
    is_right = isinstance(contents, list) and all(x is None or _is_text(x) for x in contents)
    return None if is_right else "contents"


def _key(line, kind):
    return *(line[name] for name in KEYS[kind]), line["annotator"]


def _standing(lines, kind):
    """The last line of each annotator on each clip or pair, oldest first, without the lines that retract.
    """
    standing = {}
    for line in lines:
        standing.pop(_key(line, kind), None)  # a new answer is the annotator's latest
        if not line.get("retracted"):
            standing[_key(line, kind)] = line
    return list(standing.values())


# ---- from answers to labels
def verdict(answer, bad="both"):
    """-> 1 (good) if the clip is qualified on both axes; 0 (bad) if it is unqualified on both, or with bad
    "any" on one; None in between: such a clip is dropped."""
    grades = [answer[axis] for axis in AXES]
    if min(grades) == 2:
        return 1
    worst = max(grades) if bad == "both" else min(grades)
    return 0 if worst == 0 else None


def majority(answers, bad="both"):
    """-> {file_name: 1, 0 or None}: the verdict of more than half of a clip's annotators; None, so that the
    clip is dropped, if no verdict has so many."""
    verdicts = collections.defaultdict(list)
    for answer in answers:
        verdicts[os.path.normpath(answer["file_name"])].append(verdict(answer, bad))
    return {name: _majority_of(votes) for name, votes in verdicts.items()}


def _majority_of(votes):
    for label in (1, 0):
        if 2 * votes.count(label) > len(votes):
            return label
    return None


# ---- agreement
def cohen_kappa(a, b):
    """Cohen's kappa of two annotators' categories of the same n clips; None if they would always agree by
    chance."""
    a, b = np.asarray(a), np.asarray(b)
    chance = sum((a == x).mean() * (b == x).mean() for x in set(a.tolist()) | set(b.tolist()))
    if len(a) == 0 or chance == 1:
        return None
    return float(((a == b).mean() - chance) / (1 - chance))


def fleiss_kappa(counts):
    """Fleiss' kappa of counts [n, k]: how many of a clip's annotators chose each category.

    Clips of fewer than two annotators are left out; clips may differ in their number of annotators. Agreement
    is the share of pairs of annotators that agree, as a mean over clips. Chance follows from the share of
    each category, as a mean over clips. None if they would always agree by chance. """
    counts = np.asarray(counts, float).reshape(len(counts), -1)
    counts = counts[counts.sum(1) >= 2]
    if len(counts) == 0:
        return None
    m = counts.sum(1)                                                                               # [n]
    agree = (counts * (counts - 1)).sum(1) / (m * (m - 1))
    chance = ((counts / m[:, None]).mean(0) ** 2).sum()
    return None if chance == 1 else float((agree.mean() - chance) / (1 - chance))


def agreement(answers, bad="both"):
    """-> {"physical", "deformity" or "label": {(ada, ben): (Cohen's kappa, n), ..., "all": (Fleiss' kappa,
    n)}}.

    n: how many clips both annotators have graded, or for "all" at least two of them.
    """
    by_clip = collections.defaultdict(dict)                             # file_name -> annotator -> answer
    for answer in answers:
        by_clip[os.path.normpath(answer["file_name"])][answer["annotator"]] = answer
    people, found = sorted({answer["annotator"] for answer in answers}), {}
    for column in (*AXES, "label"):
        category = {}                                                   # (clip, annotator) -> 0, 1 or 2
        for clip, row in by_clip.items():
            for who, answer in row.items():
                if column in AXES:
                    category[clip, who] = answer[column]
                else:
                    category[clip, who] = {1: 2, None: 1, 0: 0}[verdict(answer, bad)]
        found[column] = {}
        for x, y in itertools.combinations(people, 2):
            both = [clip for clip, row in by_clip.items() if x in row and y in row]
            kappa = cohen_kappa([category[clip, x] for clip in both], [category[clip, y] for clip in both])
            found[column][x, y] = kappa, len(both)
        counts = []                                                     # [n, 3]
        for clip, row in by_clip.items():
            said = [category[clip, who] for who in row]
            counts.append([said.count(grade) for grade in range(3)])
        found[column]["all"] = fleiss_kappa(counts), sum(len(row) >= 2 for row in by_clip.values())
    return found


def preference(answers):
    """-> float [n pairs, 3]: the shares of a pair's annotators for whom a wins, ties and loses."""
    votes = collections.defaultdict(list)
    for answer in answers:
        pair = answer["against"], answer["a"], answer["b"]
        votes[pair].append([answer["winner"] == x for x in ("a", "tie", "b")])
    return np.array([np.mean(rows, 0) for rows in votes.values()]).reshape(-1, 3)
