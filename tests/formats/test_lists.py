"""Lists of clips and of prompts: read as the csv and json modules read them, and written back with no other
byte changed."""
import csv
import io
import json
import os
import random
from pathlib import Path

import pytest
from fuzz import list_case
from hypothesis import example, given, settings
from hypothesis import strategies as st

import common
import label
from common import InputError
from formats import labels, metadata
from formats.prompts import read_prompts

ANSWER = {"annotator": "ada", "physical": 2, "deformity": 2, "time": 0.0}


def export(folder, content, name="metadata.csv", **grades):
    """The list's bytes after `label.py export`; grades: {a clip's name without .mp4: 0, 1 or 2 on both
    axes}."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    lines = [ANSWER | {"file_name": f"{clip}.mp4", "physical": grade, "deformity": grade} for clip,
             grade in grades.items()]
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    label.export_command(label.Said(folder=str(folder)))
    assert sorted(path.name for path in folder.iterdir()) == ["labels.jsonl", name]
    return (folder / name).read_bytes()


# ---- what is read
@settings(max_examples=400, deadline=None, database=None, derandomize=True)
@given(st.text(alphabet='a ,"\n\r\té\u2028', max_size=24))
@example('a, "b, c" , d\n')
@example('"a""b","c\r\nd"\r\n\r\n ,,"e"')
def test_csv_is_read_as_the_csv_module_reads_it(text):
    try:
        wanted = [[cell.strip() for cell in row] for row in csv.reader(
            io.StringIO(text, newline=""), strict=True, skipinitialspace=True)]
    except csv.Error:
        wanted = None
    try:
        found = [[value for value, _, _ in fields] for _, fields, _ in metadata._csv_records("x.csv", text)]
    except InputError:
        found = None
    assert (found and [row for row in found if any(row)]) == (wanted and [row for row in wanted if any(row)])


@pytest.mark.parametrize("end", ("\n", "\r\n", "\r"))
def test_a_problem_is_told_with_the_line_that_an_editor_shows(tmp_path, end):
    lines = ["", "file_name,prompt", "", 'a.mp4,"one', 'two"', "b.mp4,x,y"]
    (tmp_path / "metadata.csv").write_text(end.join(lines), newline="")
    with pytest.raises(InputError, match=r"metadata.csv row 2 \(line 6\): has 3 fields where the first row "
                                         r"names 2"):
        metadata.read_metadata(tmp_path)


def test_rows_are_counted_alike_whatever_the_problem(tmp_path):
    """Blank lines are no rows, whether the problem lies in a quote or in the number of fields."""
    (tmp_path / "metadata.csv").write_text('file_name,prompt\n\na.mp4,one\n\n\nb.mp4,"two\n')
    with pytest.raises(InputError, match=r"metadata.csv row 2 \(line 6\): its quotes do not fit"):
        metadata.read_metadata(tmp_path)


def test_a_field_may_be_as_long_as_it_likes(tmp_path):
    long = 200_000 * "x"
    (tmp_path / "metadata.csv").write_text(f'file_name,prompt,embedding\na.mp4,"{long}",{long}\n')
    assert metadata.read_metadata(tmp_path) == [{"file_name": "a.mp4", "prompt": long, "label": None}]


# ---- what is written
@pytest.mark.parametrize("seed", range(60))
def test_only_labels_differ_in_lists_of_any_dialect(tmp_path, seed):
    suffix, new, before, after = list_case(random.Random(seed))
    (tmp_path / f"metadata.{suffix}").write_bytes(before)
    assert metadata.write_labels(tmp_path, new) == tmp_path / f"metadata.{suffix}"
    assert (tmp_path / f"metadata.{suffix}").read_bytes() == after
    rows = metadata.read_metadata(tmp_path)
    assert {row["file_name"]: row["label"] for row in rows if row["file_name"] in new} == new
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("before, after",
                         [(b'file_name, prompt, label\n0.mp4, "a red circle, moving right", 0\n',
                           b'file_name, prompt, label\n0.mp4, "a red circle, moving right", 1\n'),
                          (b'\r\n\xef, Reward ,video,text\r\n"a\xe9,", "0" ,0.mp4,x'.replace(b'"0" ', b'"0"'),
                           b'\r\n\xef, Reward ,video,text\r\n"a\xe9,", "1",0.mp4,x'),
                          (b'\xef\xbb\xbffile_name,prompt\r0.mp4,"a\nb"\r\r9.mp4,x',
                           b'\xef\xbb\xbffile_name,prompt,label\r0.mp4,"a\nb",1\r\r9.mp4,x,'),
                          (b'file_name,prompt,label,reward\n0.mp4,x,0,0\n9.mp4,y,,1\n',
                           b'file_name,prompt,label,reward\n0.mp4,x,1,1\n9.mp4,y,,1\n'),
                          (b'file_name,prompt,label\n0.mp4,x,TRUE\n9.mp4,y,\n',
                           b'file_name,prompt,label\n0.mp4,x,TRUE\n9.mp4,y,\n')])
def test_export_to_csv_changes_the_label_and_no_other_byte(tmp_path, before, after):
    assert export(tmp_path / "clips", before, **{"0": 2}) == after


@pytest.mark.parametrize("before, after", [
    (b'{"file_name": "0.mp4", "note": "\\ud83d \xe9"}\n', b'{"file_name": "0.mp4", "note": "\\ud83d \xe9", '
                                                          b'"label": 1}\n'),
    (b'\xef\xbb\xbf\n{"label":\tnull ,"file_name":"./0.mp4"} \r\n\n', b'\xef\xbb\xbf\n{"label":\t1 '
                                                                      b',"file_name":"./0.mp4"} \r\n\n'),
    (b'{"x": {"label": 0}, "reward": 0.0, "file_name": "0.mp4", "y": 1e400}',
     b'{"x": {"label": 0}, "reward": 1, "file_name": "0.mp4", "y": 1e400}'),
    (b'{"label": 0, "file_name": "0.mp4", "reward": null, "label": 0}',
     b'{"label": 1, "file_name": "0.mp4", "reward": null, "label": 1}')])
def test_export_to_jsonl_changes_the_label_and_no_other_byte(tmp_path, before, after):
    assert export(tmp_path / "clips", before, "metadata.jsonl", **{"0": 2}) == after


def test_a_clip_on_which_nobody_agrees_loses_its_label_and_one_without_answers_keeps_it(tmp_path):
    text = b"file_name,label\n0.mp4,1\n1.mp4,1\n2.mp4,0\n"
    assert export(tmp_path / "a", text, **{"0": 1, "2": 2}) == b"file_name,label\n0.mp4,\n1.mp4,1\n2.mp4,1\n"
    text = b'{"file_name": "0.mp4", "label": 1}\n{"file_name": "1.mp4"}\n'
    assert export(tmp_path / "b", text, "metadata.jsonl",
                  **{"0": 1, "1": 1}) == text.replace(b": 1}", b": null}")
    assert export(tmp_path / "c", b"file_name,x\n0.mp4,1\n", **{"0": 1}) == b"file_name,x\n0.mp4,1\n"


@pytest.mark.parametrize("content", (b"file_name,prompt\n0.mp4,caf\xe9\n", b"file_name,prompt\n0.mp4,a,b\n",
                                     b'file_name\n"0.mp4\n'))
def test_a_failed_export_changes_nothing_and_leaves_nothing_behind(tmp_path, content, monkeypatch):
    folder = tmp_path / "clips"
    with pytest.raises(InputError, match="metadata.csv row 1 .line 2.: "):
        export(folder, content, **{"0": 2})
    good = b"file_name,label\n0.mp4,0\n"
    for name, error in (("replace", OSError(28, "No space left on device")), ("fsync", KeyboardInterrupt())):
        def fail(*_):
            raise error                                     # noqa: B023   is called before the loop goes on

        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(os, name, fail)
            export(folder, good, **{"0": 2})
        assert (folder / "metadata.csv").read_bytes() == good
        assert sorted(path.name for path in folder.iterdir()) == ["labels.jsonl", "metadata.csv"]


def test_a_list_stays_behind_its_link_and_keeps_its_rights(tmp_path):
    folder, real = tmp_path / "clips", tmp_path / "real.csv"
    folder.mkdir()
    real.write_bytes(b"file_name,label\n0.mp4,0\n")
    real.chmod(0o640)
    (folder / "metadata.csv").symlink_to(real)
    export(folder, real.read_bytes(), **{"0": 2})
    assert (folder / "metadata.csv").is_symlink() and real.read_bytes() == b"file_name,label\n0.mp4,1\n"
    assert real.stat().st_mode & 0o777 == 0o640


def test_a_write_that_fails_is_one_line(tmp_path, capsys, monkeypatch):
    export(tmp_path / "clips", b"file_name,label\n0.mp4,0\n", **{"0": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    (tmp_path / "clips/metadata.csv").write_bytes(b"file_name,label\n0.mp4,0\n")
    with pytest.raises(SystemExit) as end:
        common.cli(*label.COMMANDS["export"], "", [str(tmp_path / "clips")])
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.count("\n") == 1
    assert "Read-only file system" in error and "metadata.csv'" in error


def test_a_list_that_is_written_again_keeps_what_others_wrote(tmp_path):
    """As sample.py does when it continues in a folder that people have labelled meanwhile."""
    path, rows = tmp_path / "metadata.jsonl", [{"file_name": f"{i}.mp4", "prompt": f"p {i}", "seed": i}
                                               for i in range(4)]
    metadata.update_rows(path, rows[:2])
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in rows[:2])
    (tmp_path / "mine.mp4").touch()
    mine = b'{"file_name": "mine.mp4", "note": "caf\xe9", "prompt": "x"}\r\n'
    path.write_bytes(b'{"prompt":"p 1", "file_name":"./1.mp4", "seed": 1, "label": '
                     b'0}\n' + mine + b"nonsense\n"
                     b'{"file_name": "0.mp4", "prompt": "another", "label": 1}\n{"file_name": "gone.mp4"}\n')
    metadata.update_rows(path, rows[:3])
    wanted = [json.dumps(rows[0]).encode(), b'{"prompt":"p 1", "file_name":"./1.mp4", "seed": 1, "label": 0}',
              json.dumps(rows[2]).encode(), mine.rstrip(b"\n"), b"nonsense"]
    assert path.read_bytes() == b"".join(line + b"\n" for line in wanted)


# ---- labels of what was shown
def test_the_page_shows_a_clip_again_whose_film_has_changed(tmp_path, capsys):
    rows = [{"file_name": f"{i}.mp4", "prompt": "x" if i else "X "} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes(b"ab"[i % 2:i % 2 + 1])
    open_session = lambda: label.Session("clip", label.clip_items(tmp_path),
                                         labels.Journal(tmp_path / "labels.jsonl"), "ada")
    session = open_session()
    for item in session.coming(3):
        session.answer(item, {"physical": 2, "deformity": 2})
    session.journal.file.close()
    label.report_command(label.Said(folder=str(tmp_path)))
    said = "2 of 3 clips are copies of others, 3 share their prompt with others (1 prompts)"
    assert said in capsys.readouterr().out
    (tmp_path / "1.mp4").write_bytes(b"another film")
    session = open_session()
    assert [session.items[item]["key"]
            for item in session.coming(3)] == [("1.mp4",)] and len(session.answers) == 2
    assert session.notes and session.tables()[1][2] == [[2, 0, 0]]
    label.export_command(label.Said(folder=str(tmp_path)))
    assert "2 good, 0 bad, 0 dropped, 1 without answers" in capsys.readouterr().out
    assert [row["label"] for row in metadata.read_metadata(tmp_path)] == [1, None, 1]
    session.answer(session.index["1.mp4",], {"physical": 0, "deformity": 0})
    assert session.tables()[1][2] == [[2, 1, 0]]
    session.undo()
    assert session.tables()[1][2] == [[2, 0, 0]]
    session.journal.file.close()


# ---- prompts
def prompts(folder, text, name="prompts.txt"):
    (folder / name).write_bytes(text.encode())
    return [row["prompt"] for row in read_prompts(folder / name)]


def test_comments_are_skipped(tmp_path):
    text = "\ufeff# for another trainer\r\na cat\r\n\r\n  # a comment\r\na dog #2\r\n#last"
    assert prompts(tmp_path, text) == ["a cat", "a dog #2"]
    with pytest.raises(InputError, match="prompts.txt: holds no prompt"):
        prompts(tmp_path, "# a cat\n#\n")


@pytest.mark.parametrize("prompt, flag", [("a cat --w 640 --h 480", "--w"), ("a cat --n low quality", "--n"),
                          ("a cat --fs", "--fs"), ("a cat\t--seed=4", "--seed"), ("--ar 16:9 a cat", "--ar"),
                          ("a cat --no-upsample x", "--no-upsample")])
def test_flags_of_other_trainers_are_refused_with_their_line(tmp_path, prompt, flag):
    rows = {"a.txt": f"# x\na dog\n{prompt}\n", "a.jsonl": '{"prompt": "a '
                                                           'dog"}\n\n' + json.dumps({"text": prompt}),
            "a.csv": f"caption\n\n{prompt}\n"}
    for (name, text), place in zip(rows.items(), ("row 3", "row 3", r"row 1 \(line 3\)")):
        with pytest.raises(InputError, match=f"{name} {place}: {flag} is not read from a prompt") as error:
            prompts(tmp_path, text, name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("prompt",
                         ("a cat -- a dog", "a well--lit room", "a cat - black", "a --, b", "-5 degrees",
                          "a cat --", "a cat --leaping, then"))
def test_a_dash_is_not_a_flag(tmp_path, prompt):
    assert prompts(tmp_path, prompt) == [prompt]


def test_the_clips_list_serves_as_a_list_of_prompts(tmp_path):
    path = Path(tmp_path / "metadata.csv")
    path.write_text('file_name, prompt, label\n0.mp4, "a red circle, moving right", 0\n')
    assert [row["prompt"] for row in read_prompts(path)] == ["a red circle, moving right"]


