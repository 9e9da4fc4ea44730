"""docs/toy.py runs, asserts what it shows, and draws it."""
import av
import launch


def test_the_toy_shows_what_it_says(tmp_path):
    done = launch.python("-m", "docs.toy", "--output", tmp_path / "toy.png")
    assert done.returncode == 0, done.stderr[-2000:]
    image = next(av.open(str(tmp_path / "toy.png")).decode()).to_ndarray(format="rgb24")
    assert image.shape == (240, 720, 3)
    dots = (image.max(-1) > 100).reshape(240, 3, 240)[20:]              # below the titles: dots of each panel
    outside = [dots[:, k, 180:].mean() for k in range(3)]                       # right of the ring
    assert dots[:, 0].mean() > 0.01 and outside[2] > 10 * max(outside[0], outside[1], 1e-4)
