"""Names are names: no protocol, no pattern; and what cannot be written or is spelt otherwise is told in one
line."""
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from common import InputError
from formats import paths, picture, video

NAMES = ("take:1.mp4", "http:x.mp4", "file:a.mp4", "concat:a|b.mp4", "lr=1e-4.mp4", "50%d.mp4", "-1.mp4",
         "a*[1]?.mp4", "#x y.mp4", "x" * 251 + ".mp4")
FILM = np.full((3, 16, 16, 3), (200, 40, 30), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write_video(name, FILM)                                   # relative: a protocol would come first
    assert video.read_video(name).shape == (3, 16, 16, 3) and os.listdir() == [name]
    if len(name) < 200:
        video.copy_for_browser(name, f"copy of {name}")
        picture.write_gif(name[:-4] + ".gif", FILM)
        assert len(video.read_video(f"copy of {name}")) == 3 and len(
            video.read_video(name[:-4] + ".gif")) == 7


@pytest.mark.parametrize("name", ("take:1.png", "a%03d.png", "50%.png", "a*.png"))
def test_the_name_of_a_picture_is_no_pattern(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    video.write_png("a001.png", np.zeros((8, 8, 3), np.uint8))
    video.write_png("a002.png", np.zeros((8, 8, 3), np.uint8))
    video.write_png(name, np.full((16, 16, 3), 200, np.uint8))
    got = video.read_video(name)
    assert got.shape == (1, 16, 16, 3) and (got == 200).all()


# ---- Unicode's forms
@pytest.mark.parametrize("there, asked, form", (("NFD", "NFC", "NFD"), ("NFC", "NFD", "NFC")))
def test_a_name_in_another_unicode_form_gets_a_hint(tmp_path, there, asked, form):
    name = "caf\N{LATIN SMALL LETTER E WITH ACUTE}/\N{LATIN SMALL LETTER U WITH DIAERESIS}ber.mp4"
    here = tmp_path / unicodedata.normalize(there, name)
    video.write_video(here, FILM)
    wanted = tmp_path / unicodedata.normalize(asked, name)
    assert paths.same_letters(wanted) == here
    with pytest.raises(InputError,
        match=rf"there is no such file, but one with the same letters in another Unicode form .{form}."):
        video.read_video(wanted)
    assert paths.same_letters(here) is None and paths.other_spelling(tmp_path / "none.mp4") == ""
    with pytest.raises(InputError, match="there is no such file$"):
        video.read_video(tmp_path / "none" / "x.mp4")


# ---- outputs
def test_an_output_that_can_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.mp4").write_text("x")
    for path in ("a.mp4", "old.mp4", "new/folder/a.mp4", str(tmp_path / "b.mp4"), "../take:1.mp4",
                 "x" * 251 + ".mp4"):
        paths.require_writable(path)
    assert os.listdir() == ["old.mp4"]


@pytest.mark.parametrize("path, why", (
    ("file/a.mp4", "Not a directory"), ("file/new/a.mp4", "Not a directory"), ("folder", "is a folder"),
    ("/proc/new/a.mp4", "cannot be written"), ("new/" + "x" * 256, "more than 255 bytes"),
    ("x" * 256, "more than 255 bytes"), ("dangling/a.mp4", "cannot be written"),
    ("\u00fc" * 128 + ".mp4", "more than 255 bytes")))
def test_an_output_that_cannot_be_written_is_told(tmp_path, monkeypatch, path, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match=why) as told:
        paths.require_writable(path)
    assert str(told.value).startswith(path) and "\n" not in str(told.value) and len(
        list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights and take them back")
def test_a_folder_of_others_is_told(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    try:
        os.seteuid(65534)
        with pytest.raises(InputError,
            match="theirs/new/a.mp4: cannot be written .Permission denied.: name another place"):
            paths.require_writable(tmp_path / "theirs/new/a.mp4")
    finally:
        os.seteuid(0)


def test_outputs_are_known_before_any_work(tmp_path, monkeypatch):
    import common
    import data
    import evaluate
    import sample
    import train_align
    from formats import wan
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for flags in ({"output": "file/a.mp4"}, {"contact_sheet": "file/a.png"},
                  {"prompts": "p.txt", "output_dir": "file"}):
        name = list(flags)[-1]
        with pytest.raises(InputError, match=f"^--{name} {flags[name]}: cannot be written"):
            sample.check_flags(sample.Config(**flags))
    not_yet = lambda *args, **more: pytest.fail("work has begun")
    with pytest.raises(InputError, match="^--out file/x: cannot be written"):
        wan.export(wan.Export("x", out="file/x"), not_yet, not_yet)
    monkeypatch.setattr(train_align, "load_transformer", not_yet)
    with pytest.raises(InputError, match="^--output_dir file/x: cannot be written"):
        train_align.main(train_align.Config(output_dir="file/x"))
    Path("clips").mkdir()
    Path("clips/metadata.jsonl").write_text('{"file_name": "a.mp4", "prompt": "x"}\n')
    for name in ("load_vae", "load_text_encoder"):
        monkeypatch.setattr(data, name, not_yet)
    with pytest.raises(InputError, match="^--out file/x: cannot be written"):
        data.encode_command(data.Encode("clips", out="file/x"))
    monkeypatch.setattr(common, "setup", not_yet)
    for out, why in (("file/x", "cannot be written"), ("clips", "holds files that are not ours")):
        with pytest.raises(InputError, match=f"^--output_dir {out}: {why}"):
            evaluate.main(evaluate.Config(output_dir=out))


def test_folders_with_equals_signs_are_folders(tmp_path, monkeypatch):
    from evaluate import name_of_folder
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=2").mkdir()
    for part, found in (("mine=runs/x", ("mine", "runs/x")), ("mine=runs/lr=1e-4", ("mine", "runs/lr=1e-4")),
                        ("runs/lr=1e-4", ("lr=1e-4", "runs/lr=1e-4")), ("lr=2", ("lr=2", "lr=2")),
                        ("./lr=3", ("lr=3", "./lr=3")), ("runs/x", ("x", "runs/x"))):
        assert name_of_folder(part) == found
