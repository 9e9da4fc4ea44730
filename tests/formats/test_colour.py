"""Colours: what is written names its matrix and is read alike by its tags, by its lines and by us; what
others write without tags is read as players do."""
import av
import numpy as np
import pytest
import torch

from formats import colour, video

RED = (200, 40, 30)
# of red and blue, in H.273
WEIGHTS = {1: (.2126, .0722), 5: (.299, .114), 6: (.299, .114), 7: (.212, .087), 9: (.2627, .0593)}


def to_planes(rgb, matrix, full=False):
    """One colour of RGB (0 to 255) -> its values of Y, Cb, Cr by H.273's equations."""
    red, blue = WEIGHTS[matrix]
    r, g, b = np.array(rgb) / 255
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    scale, start, span = (255, 0, 255) if full else (219, 16, 224)
    return round(start + scale * y), round(128 + span * cb), round(128 + span * cr)


def to_rgb(planes, matrix):
    """The same backwards, for the range of 16 to 235."""
    red, blue = WEIGHTS[matrix]
    y, cb, cr = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return 255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])


def film(path, size, rgb=RED, matrix=6, full=False, **tags):
    """A film of others, lossless: its planes hold `rgb` by that matrix; tags: what it says of itself."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for _ in range(2):
            frame = av.VideoFrame(*size, "yuv420p")
            for plane, value in zip(frame.planes, to_planes(rgb, matrix, full), strict=True):
                plane.update(np.full(plane.buffer_size, value, np.uint8).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def near(image, rgb=RED, most=3):
    return np.abs(np.asarray(image).reshape(-1, 3)[-1].astype(int) - rgb).max() <= most


# ---- what is written
@pytest.mark.parametrize("size, matrix",
                         (((32, 32), 6), ((832, 48), 6), ((48, 832), 1), ((96, 718), 6), ((96, 719), 1),
                          ((96, 720), 1)))
@pytest.mark.parametrize("rgb", (RED, (20, 200, 90), (255, 255, 255)))
def test_what_is_written_is_tagged_and_everybody_reads_it_alike(tmp_path, size, matrix, rgb):
    path = tmp_path / "a.mp4"
    video.write_video(path, np.full((2, size[1], size[0], 3), rgb, np.uint8))
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (matrix, 1, 1, 1)
    box = path.read_bytes().partition(b"colrnclx")[2][:6]
    assert box == bytes((0, 1, 0, 1, 0, matrix))                    # for players that read the container only
    planes = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
    assert near(to_rgb(np.array(planes, float), matrix), rgb)                       # by the tag, by hand
    assert matrix == (1 if frame.height >= 720 else 6)                              # and by the lines
    assert near(frame.reformat(format="rgb24").to_ndarray(), rgb)                   # FFmpeg
    got, _, facts = video.read_clip_facts(path)
    assert near(got, rgb) and facts.colours is None


def test_small_videos_have_the_pixels_that_they_had_without_tags(tmp_path):
    """Below 720 lines tags add a name and change no pixel: FFmpeg's own defaults give the same planes, and
    are read alike."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (3, 12, 12, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    video.write_video(tmp_path / "a.mp4", pictures)
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 48, "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture,
                                            format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    assert torch.equal(video.read_video(tmp_path / "a.mp4"), video.read_video(tmp_path / "b.mp4"))


# ---- what is read
@pytest.mark.parametrize("size, matrix, guessed",
                         (((960, 720), 1, "guessed"), ((320, 832), 1, "guessed"), ((320, 64), 6, None),
                          ((96, 64), 6, None)))
def test_without_a_tag_the_lines_decide_as_in_players(tmp_path, size, matrix, guessed):
    path = film(tmp_path / "a.mkv", size, matrix=matrix)
    for small in (None, (32, 32)):
        got, _, facts = video.read_clip_facts(path, small)
        assert near(got) and facts.colours == guessed


@pytest.mark.parametrize("size", ((32, 720), (96, 64)))
@pytest.mark.parametrize("matrix", (1, 5, 6, 7))
def test_a_tag_counts_more_than_the_lines(tmp_path, size, matrix):
    got, _, facts = video.read_clip_facts(film(tmp_path / "a.mkv", size, matrix=matrix, colorspace=matrix))
    assert near(got) and facts.colours is None


@pytest.mark.parametrize("size, matrix", (((32, 720), 1), ((96, 64), 6)))
def test_the_full_range_is_read_as_such(tmp_path, size, matrix):
    assert near(video.read_video(film(tmp_path / "a.mkv", size, matrix=matrix, full=True, color_range=2)))


@pytest.mark.parametrize("name, pix_fmt", (("a.png", "rgb24"), ("a.png", "rgba"), ("a.png", "gray"),
                                           ("a.gif", "pal8"), ("a.mkv", "gray"), ("a.mkv", "bgr0")))
def test_pixels_without_a_matrix_are_not_guessed(tmp_path, name, pix_fmt):
    rgb = (90, 90, 90) if pix_fmt == "gray" else RED
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream({"a.png": "png", "a.gif": "gif", "a.mkv": "ffv1"}[name], rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 720, pix_fmt
        frame = av.VideoFrame.from_ndarray(np.full((720, 16, 3), rgb, np.uint8), format="rgb24")
        if pix_fmt == "pal8":
            frame = frame.reformat(format="bgr8")
            stream.pix_fmt = "bgr8"
        container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    got, _, facts = video.read_clip_facts(tmp_path / name)
    assert facts.colours is None and near(got, rgb, 30 if pix_fmt == "pal8" else 1)


def test_transparent_ones_of_720_lines_are_read_by_the_same_matrix(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 720, "yuva420p"
        frame = av.VideoFrame(16, 720, "yuva420p")
        for plane, value in zip(frame.planes, (*to_planes(RED, 1), 255), strict=True):
            plane.update(np.full(plane.buffer_size, value, np.uint8).tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    got, _, facts = video.read_clip_facts(tmp_path / "a.mkv")
    assert near(got) and facts.colours == "guessed"


def test_wide_gamuts_and_unknown_ones_are_not_guessed():
    assert colour.kind(2, 2, 2,
        720) == "guessed" and colour.kind(2, 2, 2, 719) is None and colour.kind(1, 1, 1, 720) is None
    assert colour.kind(18, 9, 2,
        720) == colour.kind(1, 12, 2, 720) == "converted" and colour.kind(8, 1, 2, 720) == "approximate"
    assert [colour.matrix_of(2, 2, 2, lines) for lines in (64, 719, 720, 2160)] == [6, 6, 1, 1]
    assert colour.matrix_of(18, 2, 2,
                            64) == colour.matrix_of(2, 9, 2, 64) == 9 and colour.matrix_of(16, 1, 2, 64) == 1
