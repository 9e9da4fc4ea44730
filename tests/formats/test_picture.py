"""picture.py: what is drawn where, and that a GIF gives its frames back."""
import numpy as np
import pytest

from formats.picture import CHARACTERS, FONT, GREEN, GREY, RED, WHITE, draw_text, wall, write_gif
from formats.video import read_video


def test_every_character_is_drawn_and_differs_from_the_others():
    shapes = {character: glyph.tobytes() for character, glyph in FONT.items()}
    assert len(set(shapes.values())) == len(CHARACTERS) and not FONT[" "].any()
    image = np.zeros((8, 12, 3), np.uint8)
    draw_text(image, "T~", 0, 0)
    assert (image[0, :5] == WHITE).all() and (image[1:7, 2] == WHITE).all() and not image[1:7, 0].any()  # a T
    assert np.array_equal(image[:, 6:11, 0] > 0, FONT["?"])                              # what the font lacks


def test_text_that_does_not_fit_is_cut_off():
    image = np.zeros((4, 9, 3), np.uint8)
    draw_text(image, "HHH", 0, 0)
    assert (image[:, 0] == WHITE).all() and (image[:, 6] == WHITE).all()


def test_a_wall_holds_the_clips_enlarged_and_framed():
    rng = np.random.default_rng(0)
    videos = {name: rng.integers(0, 255, (2, 3, 16, 16, 3), np.uint8) for name in ("a", "b")}
    good = {"a": np.array([True, False]), "b": np.array([False, True])}
    out = wall(videos, ["one", "two"], {"a": ("a",), "b": ("b",)}, good, cell=32)
    for column, name in enumerate("ab"):
        for row in range(2):
            top, left = 34 + row * 46, 150 + column * 46
            color = GREEN if good[name][row] else RED
            assert (out[:, top, left:left + 40] == color).all() and (
                out[:, top:top + 40, left + 39] == color).all()
            # twice as large
            assert np.array_equal(out[:, top + 4:top + 36:2, left + 4:left + 36:2], videos[name][row])
            assert np.array_equal(out[:, top + 5:top + 36:2, left + 5:left + 36:2], videos[name][row])
    assert (out[0, :, :150] == GREY).all(-1).sum() > 30                                         # the prompts


def test_a_gif_gives_its_frames_back_and_holds_the_last(tmp_path):
    levels = np.arange(0, 240, 40, dtype=np.uint8)
    video = np.stack([np.full((16, 20, 3), (level, 200, 240 - level), np.uint8) for level in levels])
    write_gif(tmp_path / "new/x.gif", video, fps=8, hold=2)
    got = read_video(tmp_path / "new/x.gif").numpy()
    assert np.abs(got.astype(int) - np.concatenate([video, video[-1:], video[-1:]])).max() <= 6
    assert b"NETSCAPE2.0" in (tmp_path / "new/x.gif").read_bytes()                              # it loops
    with pytest.raises(ValueError):
        write_gif(tmp_path / "y.gif", np.zeros((2, 16, 20), np.uint8))
    assert not (tmp_path / "y.gif").exists() and len(list(tmp_path.iterdir())) == 1
