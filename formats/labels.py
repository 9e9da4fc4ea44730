"""What people said of clips: files of JSON lines that lie beside the clips and only ever grow (label.py writes them).

    clips/labels.jsonl   {"file_name": "a.mp4", "annotator": "ada", "physical": 2, "deformity": 1, "time": 1764070000.25}
    clips/pairs.jsonl    {"against": "../sft", "prompt": "...", "a": "a.mp4", "b": "c.mp4", "left": "b", "winner": "a",
                          "annotator": "ada", "time": ...}

physical (plausibility) and deformity (of the subject) are graded 0 unqualified, 1 partially qualified, 2 qualified (A.2.3,
Table 6). An annotator's last line on a clip, or on a pair, is the one that stands. Undo adds a line with "retracted": true
in place of the answer, so nothing that was said is ever lost. time: seconds since 1970.

Axes: n clips, k categories, m annotators.
"""
import collections
import itertools
import json
import os
from pathlib import Path

import numpy as np

from common import InputError
from formats import disk, lock
from formats.metadata import from_json

AXES = ("physical", "deformity")
BAD = ("both", "any")                                   # bad is: unqualified on both axes (A.2.3), or on any
CLIP_RULES = {"file_name": lambda x: isinstance(x, str) and x} | {
    axis: lambda x: x in (0, 1, 2) and type(x) is int for axis in AXES}
PAIR = {name: lambda x: isinstance(x, str) for name in ("against", "prompt", "a", "b")} \
    | {"winner": lambda x: x in ("a", "tie", "b")}
KEYS = {"clip": ("file_name",), "pair": ("against", "a", "b")}


# ---- the files
class Journal:
    """A file of JSON lines, one writer at a time; a line is on the disk when `append` returns. Raises InputError if another
    process writes it."""

    def __init__(self, path):
        self.path, new = Path(path), not Path(path).exists()
        self.file = self.path.open("a+b", buffering=0)
        if not lock.take(self.file, self.path.parent):
            raise InputError(f"{self.path.parent}: another label.py has this folder open: stop that one first")
        if new:                                                         # the name, too, has to be on the disk
            disk.flush(self.path.parent)
        whole = self.path.read_bytes()
        tail = whole[whole.rfind(b"\n") + 1:]
        if tail and _is_json(tail):
            self.file.write(b"\n")
        elif tail:                              # a kill or a full disk cut it short: nobody was told that it is saved
            self.file.truncate(len(whole) - len(tail))

    def append(self, line):
        """Raises OSError, and leaves the file as it was, if the line cannot be saved."""
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
    """-> the answers that stand, oldest first, of a labels.jsonl ("clip") or a pairs.jsonl ("pair"); [] if there is no such
    file. Raises InputError naming the first line that is no answer; a last line that a kill cut short is none."""
    rules, standing = CLIP_RULES if kind == "clip" else PAIR, {}
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for number, text in enumerate(lines, 1):
        if not text.strip() or number == len(lines) and not _is_json(text):
            continue
        try:
            line = from_json(text)
            wanted = {name: rule for name, rule in rules.items() if name in KEYS[kind] or not line.get("retracted")}
            wrong = [name for name, rule in ({"annotator": CLIP_RULES["file_name"]} | wanted).items() if not rule(line.get(name))]
        except (ValueError, AttributeError):
            raise InputError(f"{path} line {number}: not a JSON object: mend or remove that line") from None
        if wrong:
            raise InputError(f"{path} line {number}: {wrong[0]} is {line.get(wrong[0])!r}: mend or remove that line")
        key = *(line[name] for name in KEYS[kind]), line["annotator"]
        standing.pop(key, None)                                         # a new answer is the annotator's latest
        if not line.get("retracted"):
            standing[key] = line
    return list(standing.values())


# ---- from answers to labels
def verdict(answer, bad="both"):
    """-> 1 good: qualified on both axes; 0 bad: unqualified on both (bad "any": on one); None: in between, dropped."""
    grades = [answer[axis] for axis in AXES]
    return 1 if min(grades) == 2 else 0 if (max if bad == "both" else min)(grades) == 0 else None


def majority(answers, bad="both"):
    """-> {file_name: 1 | 0 | None}: the verdict of more than half of a clip's annotators, None (dropped) if there is none."""
    found = collections.defaultdict(list)
    for answer in answers:
        found[os.path.normpath(answer["file_name"])].append(verdict(answer, bad))
    return {name: next((label for label in (1, 0) if 2 * votes.count(label) > len(votes)), None)
            for name, votes in found.items()}


# ---- agreement
def cohen_kappa(a, b):
    """Cohen's kappa of two annotators' categories of the same n clips; None where chance alone would agree always."""
    a, b = np.asarray(a), np.asarray(b)
    chance = sum((a == x).mean() * (b == x).mean() for x in set(a.tolist()) | set(b.tolist()))
    return None if not len(a) or chance == 1 else float(((a == b).mean() - chance) / (1 - chance))


def fleiss_kappa(counts):
    """Fleiss' kappa of counts [n, k]: how many of a clip's annotators chose each category. Clips of fewer than two are left
    out. Clips may differ in their number of annotators: agreement is the mean over clips of the share of agreeing pairs,
    chance the mean over clips of the share of each category. None where chance alone would agree always."""
    counts = np.asarray(counts, float).reshape(len(counts), -1)
    counts = counts[counts.sum(1) >= 2]
    m = counts.sum(1)                                                                               # [n]
    agree = (counts * (counts - 1)).sum(1) / (m * (m - 1))
    chance = ((counts / m[:, None]).mean(0) ** 2).sum() if len(counts) else 1
    return None if chance == 1 else float((agree.mean() - chance) / (1 - chance))


def agreement(answers, bad="both"):
    """-> {"physical" | "deformity" | "label": {(ada, ben): (Cohen's kappa, n), ..., "all": (Fleiss' kappa, n)}}, over the n
    clips that both, or at least two of all, have graded."""
    graded = collections.defaultdict(dict)                              # file_name -> annotator -> answer
    for answer in answers:
        graded[os.path.normpath(answer["file_name"])][answer["annotator"]] = answer
    people, found = sorted({answer["annotator"] for answer in answers}), {}
    for what in (*AXES, "label"):
        say = lambda answer: answer[what] if what in AXES else {1: 2, None: 1, 0: 0}[verdict(answer, bad)]
        found[what] = {}
        for x, y in itertools.combinations(people, 2):
            both = [(say(row[x]), say(row[y])) for row in graded.values() if x in row and y in row]
            found[what][x, y] = cohen_kappa(*zip(*both)) if both else None, len(both)
        counts = [[[say(answer) for answer in row.values()].count(grade) for grade in range(3)] for row in graded.values()]
        found[what]["all"] = fleiss_kappa(counts), sum(len(row) >= 2 for row in graded.values())
    return found


def preference(answers):
    """-> win, tie, lose of A: float [n pairs, 3], each row the shares of that pair's annotators."""
    found = collections.defaultdict(list)
    for answer in answers:
        found[answer["against"], answer["a"], answer["b"]].append([answer["winner"] == x for x in ("a", "tie", "b")])
    return np.array([np.mean(votes, 0) for votes in found.values()]).reshape(-1, 3)
