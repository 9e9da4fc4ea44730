"""Answers on disk, labels from answers, and agreement against values computed by hand."""
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from common import InputError
from formats import fingerprint, labels


def say(name, physical, deformity, who="ada", **more):
    return {"file_name": name, "annotator": who, "physical": physical, "deformity": deformity,
            "time": 1.0} | more


def undo(name, who="ada"):
    return {"file_name": name, "annotator": who, "retracted": True, "time": 2.0}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# ---- the file
def test_the_last_answer_stands_and_a_retracted_one_does_not(tmp_path):
    path = write(tmp_path / "labels.jsonl", say("a", 2, 2), say("b", 0, 0), say("a", 1, 0),
                 say("b", 0, 1, "ben"), undo("b"), undo("c"), say("d", 2, 1), undo("d"), say("d", 2, 2))
    assert labels.read_answers(path) == [say("a", 1, 0), say("b", 0, 1, "ben"), say("d", 2, 2)]
    assert labels.read_answers(tmp_path / "nowhere.jsonl") == []


def test_a_line_that_a_kill_cut_short_was_never_said_and_the_next_one_is_whole(tmp_path):
    path = write(tmp_path / "labels.jsonl", say("a", 2, 2))
    whole = path.read_bytes()
    for tail in (b'{"file_name": "b", "ann', "{\"file_name\": \"ä".encode()[:-1], b"{", b'{"file_name": '
                                                                                        b'"b"}'[:-1]):
        path.write_bytes(whole + tail)
        assert labels.read_answers(path) == [say("a", 2, 2)]
        journal = labels.Journal(path)
        journal.append(say("ü.mp4", 0, 0))
        journal.file.close()
        assert labels.read_answers(path) == [say("a", 2, 2), say("ü.mp4", 0, 0)]
    path.write_bytes(whole + json.dumps(say("b", 1, 1)).encode())  # whole, only its newline is missing: kept
    assert len(labels.read_answers(path)) == 2
    labels.Journal(path).append(say("c", 0, 0))
    assert [line["file_name"] for line in labels.read_answers(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("line, wanted", [
    ("garbage}", "line 2: not a JSON object"), ("[1]", "line 2: not a JSON object"),
    ('{"annotator": "ada", "physical": 1, "deformity": 1}', "line 2: file_name is None"),
    ('{"file_name": "a", "physical": 1, "deformity": 1}', "line 2: annotator is None"),
    ('{"file_name": "a", "annotator": "ada", "physical": 3, "deformity": 1}', "line 2: physical is 3"),
    ('{"file_name": "a", "annotator": "ada", "physical": true, "deformity": 1}', "line 2: physical is True"),
    ('{"file_name": "a", "annotator": "ada", "physical": 1}', "line 2: deformity is None"),
    ('{"file_name": "a", "annotator": "ada", "physical": 1, "deformity": 1.0}', "line 2: deformity is 1.0"),
    ('{"file_name": "a", "annotator": 7, "retracted": true}', "line 2: annotator is "
                                                              "7"), ("\xff", "line 2: not a JSON")])
def test_a_damaged_line_is_named(tmp_path, line, wanted):
    path = write(tmp_path / "labels.jsonl", say("a", 2, 2))
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n" + json.dumps(say("b", 0, 0)).encode()
                     + b"\n")
    with pytest.raises(InputError) as error:
        labels.read_answers(path)
    assert str(error.value).startswith(f"{path} {wanted}") and "\n" not in str(error.value)


def write_for_ever(path, pipe):
    journal = labels.Journal(path)
    for i in itertools.count():
        journal.append(say(f"{i}.mp4", i % 3, 2))
        pipe.send(i)


def test_what_was_confirmed_is_there_after_kill_9_and_only_one_process_writes(tmp_path):
    path, fork = tmp_path / "labels.jsonl", multiprocessing.get_context("fork")
    for _ in range(5):
        before = len(labels.read_answers(path))
        mine, other = fork.Pipe(duplex=False)
        writer = fork.Process(target=write_for_ever, args=(path, other))
        writer.start()
        other.close()
        confirmed = mine.recv()
        with pytest.raises(InputError, match="another label.py has this folder open"):
            labels.Journal(path)
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                confirmed = mine.recv()
        assert confirmed + 1 <= len(labels.read_answers(path)) <= max(before, confirmed + 2)
    labels.Journal(path).append(say("0.mp4", 2, 2))                     # its lock died with it


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = write(tmp_path / "labels.jsonl", say("a", 2, 2))
    journal, before = labels.Journal(path), path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on "
                                                                                      "device")))
    with pytest.raises(OSError, match="No space"):
        journal.append(say("b", 0, 0))
    assert path.read_bytes() == before


# ---- answers know what their clips held
def film(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def answered(path, *lines):
    """Lines as label.py writes them: each with the contents of the files beside."""
    with path.open("a") as file:
        for line in lines:
            file.write(json.dumps(line | {"contents": labels.contents_beside(path, line)}) + "\n")


def test_an_answer_does_not_count_for_another_film_under_the_same_name(tmp_path):
    path = tmp_path / "labels.jsonl"
    for name in "abc":
        film(tmp_path / f"{name}.mp4", name.encode())
    answered(path, say("a.mp4", 2, 2), say("./b.mp4", 0, 0), say("b.mp4", 0, 0, "ben"), say("c.mp4", 2, 2))
    assert [line["contents"]
            for line in labels.read_answers(path)][1] == [hashlib.blake2b(b"b", digest_size=16).hexdigest()]
    assert labels.current_answers(path) == (labels.read_answers(path), [])
    film(tmp_path / "b.mp4", b"another film")
    (tmp_path / "c.mp4").unlink()  # what cannot be read is not called another film
    answers, notes = labels.current_answers(path)
    assert [line["file_name"] for line in answers] == ["a.mp4", "c.mp4"]
    assert notes == [f"{path}: 2 of 4 answers were given for other content under the same name: not used, "
                     "and label.py asks again"]
    answered(path, say("b.mp4", 2, 2, "ben"))  # he was asked again, and she was not yet
    answers, notes = labels.current_answers(path)
    assert labels.majority(answers) == {"a.mp4": 1, "b.mp4": 1, "c.mp4": 1} and len(answers) == 3
    assert len(notes) == 1 and "1 of 4 answers were given for other content" in notes[0]
    film(tmp_path / "b.mp4", b"b")  # the old film comes back, and its answers with it
    answers, notes = labels.current_answers(path)
    assert [(line["file_name"], line["physical"]) for line in answers[1:3]] == [("./b.mp4", 0), ("b.mp4", 0)]


def test_answers_without_contents_count_and_are_counted(tmp_path):
    path = write(tmp_path / "labels.jsonl", say("a.mp4", 2, 2), say("b.mp4", 0, 0), undo("b.mp4"))
    film(tmp_path / "a.mp4", b"another film")
    film(tmp_path / "c.mp4", b"c")
    answered(path, say("c.mp4", 2, 2))
    answers, notes = labels.current_answers(path)
    assert answers == labels.read_answers(path) and len(answers) == 2
    assert notes == [f"{path}: 1 of 2 answers, from an older label.py, do not say for which content they "
                     "were given: they count"]
    assert labels.current_answers(tmp_path / "nowhere.jsonl") == ([], [])


def test_both_films_of_a_pair_are_known(tmp_path):
    for name, content in (("a/0.mp4", b"0"), ("b/0.mp4", b"1"), ("b/1.mp4", b"2")):
        film(tmp_path / name, content)
    path = tmp_path / "a/pairs.jsonl"
    row = {"against": "../b", "prompt": "p", "a": "0.mp4", "winner": "a", "annotator": "ada"}
    answered(path, row | {"b": "0.mp4"}, row | {"b": "1.mp4"})
    film(tmp_path / "b/1.mp4", b"3")
    answers, notes = labels.current_answers(path, "pair")
    assert [line["b"]
            for line in answers] == ["0.mp4"] and "1 of 2 answers were given for other content" in notes[0]
    film(tmp_path / "a/0.mp4", b"4")
    assert labels.current_answers(path, "pair")[0] == []


def test_a_file_that_has_not_changed_is_read_once(tmp_path, monkeypatch):
    path, read = tmp_path / "labels.jsonl", []
    film(tmp_path / "a.mp4", b"a")
    answered(path, say("a.mp4", 2, 2), say("a.mp4", 2, 2, "ben"))
    real = fingerprint.of_file
    monkeypatch.setattr(fingerprint, "of_file", lambda path: (read.append(path), real(path))[1])
    for _ in range(3):
        assert len(labels.current_answers(path)[0]) == 2
    assert len(read) == 1
    film(tmp_path / "a.mp4", b"b")
    assert labels.current_answers(path)[0] == [] and len(read) == 2
    (tmp_path / ".contents.json").unlink()
    (tmp_path / ".contents.json").mkdir()  # nothing can be remembered there: told by nobody
    assert labels.current_answers(path)[0] == []


@pytest.mark.parametrize("contents", ('"x"', "[1]", "{}", "3"))
def test_damaged_contents_are_named(tmp_path, contents):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps(say("a", 2, 2))[:-1] + f', "contents": {contents}}}\n')
    with pytest.raises(InputError, match="labels.jsonl line 1: contents is "):
        labels.current_answers(path)


# ---- labels
def test_verdicts_are_the_papers():
    grid = lambda bad: {(p, d): labels.verdict(say("a", p, d), bad) for p in range(3) for d in range(3)}
    assert grid("both") == {(2, 2): 1, (0, 0): 0} | {key: None for key in grid("both")
                                                     if key not in ((2, 2), (0, 0))}
    assert grid("any") == {(2, 2): 1, (1, 1): None, (1, 2): None, (2, 1): None,
                           (0, 0): 0, (0, 1): 0, (0, 2): 0, (1, 0): 0, (2, 0): 0}


def test_the_majority_decides_and_a_tie_is_dropped():
    good, bad, middle = (2, 2), (0, 0), (1, 2)
    said = {"one": [good], "two": [good, bad], "three": [good, good, bad], "none": [good, bad, middle],
            "half": [good, good, bad, middle], "down": [bad, bad, middle], "partial": [middle, middle, good]}
    answers = [say(name, *grades, who=f"p{i}") for name, votes in said.items() for i,
               grades in enumerate(votes)]
    assert labels.majority(answers) == {"one": 1, "two": None, "three": 1, "none": None, "half": None,
                                        "down": 0, "partial": None}
    assert labels.majority([say("x/../a.mp4", 2, 0)], "any") == {"a.mp4": 0}


# ---- agreement
def test_cohens_kappa_by_hand():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed .7, chance .5 * .6 + .5 * .4 = .5, kappa .2 / .5
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert labels.cohen_kappa(a, b) == pytest.approx(0.4)
    # three grades, diagonal 2 of 3, chance (1/3)(2/3) + (1/3)(0) + (1/3)(1/3) = 1/3
    assert labels.cohen_kappa([0, 1, 2], [0, 0, 2]) == pytest.approx((2 / 3 - 1 / 3) / (2 / 3))
    assert labels.cohen_kappa([0, 1],
                              [1, 0]) == pytest.approx(-1) and labels.cohen_kappa([2, 2], [2, 2]) is None
    assert labels.cohen_kappa([], []) is None


def test_fleiss_kappa_by_hand():
    # Fleiss' layout of 10 subjects, 14 raters, 5 categories: mean agreement .378, chance .213, kappa .210
    counts = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
              [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert labels.fleiss_kappa(counts) == pytest.approx(0.20993, abs=1e-5)
    # three raters: clips 3-0 and 2-1, agreement (1 + 1/3) / 2 = 2/3, chance (5/6)^2 + (1/6)^2 = 26/36
    assert labels.fleiss_kappa([[3, 0], [2, 1]]) == pytest.approx((2 / 3 - 26 / 36) / (1 - 26 / 36))
    # a clip of one rater says nothing; two raters of one and three of another: agreement (0 + 1) / 2, shares
    # 1/4 and 3/4
    assert labels.fleiss_kappa([[1, 1], [0, 3], [1, 0]]) == pytest.approx((0.5 - 0.625) / 0.375)
    assert labels.fleiss_kappa([[3, 0], [3, 0]]) is None and labels.fleiss_kappa([[1, 0]]) is None


def test_agreement_is_over_the_clips_that_both_graded():
    answers = [say("a", 2, 2), say("b", 0, 0), say("c", 1, 1), say("a", 2, 0, "ben"), say("./b", 0, 0, "ben"),
               say("d", 0, 0, "eva")]
    found = labels.agreement(answers)
    assert found["physical"]["ada", "ben"] == (1.0, 2) and found["physical"]["all"] == (1.0, 2)
    assert found["deformity"]["ada", "ben"] == (0.0, 2)  # agrees on one of two, chance .5 * 1 + .5 * 0
    # good, bad against dropped, bad: (.5 - .25) / .75
    assert found["label"]["ada", "ben"] == (pytest.approx(1 / 3), 2)
    assert found["label"]["ada", "eva"] == (None, 0)


def test_preference_is_a_share_per_pair():
    row = lambda a, winner, who: {"against": "../b", "prompt": "p", "a": a, "b": "x", "winner": winner,
                                  "annotator": who}
    got = labels.preference([row("1", "a", "ada"), row("1", "b", "ben"), row("2", "tie", "ada"),
                             row("3", "b", "ada")])
    assert np.array_equal(got,
                          [[0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]]) and labels.preference([]).shape == (0, 3)
