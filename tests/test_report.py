"""report.py's influence values against automatic differentiation of the weighted statistic."""
import av
import numpy as np
import pytest
import torch

import report


def influence(statistic, n):
    """n times the derivative of statistic(weights [n]) at equal weights: how much one video more would move
    it."""
    weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
    value = statistic(weights)
    return value.item(), n * torch.autograd.grad(value, weights)[0].numpy()


@pytest.mark.parametrize("name", ["auc", "balanced"])
def test_values_are_the_statistic_and_what_each_video_moves_it_by(name):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 30, generator=g).round(decimals=1)
    labels = (torch.rand(2, 30, generator=g) < 0.3).long()
    right = ((logits >= 0) == (labels == 1)[:, None]).double()
    if name == "auc":
        found = report.auc_values(logits, labels)
    else:
        found = report.balanced_values(right.numpy(), labels)
    for seed in range(2):
        good = labels[seed] == 1
        for i in range(5):
            def auc(w):
                x = logits[seed, i]
                wins = (x[good][:, None] > x[~good]).double() + 0.5 * (x[good][:, None] == x[~good]).double()
                return (w[good][:, None] * w[~good] * wins).sum() / (w[good].sum() * w[~good].sum())

            def balanced(w):
                return sum((w * right[seed, i])[part].sum() / w[part].sum() for part in (good, ~good)) / 2

            value, moved = influence(auc if name == "auc" else balanced, 30)
            np.testing.assert_allclose(found[seed, i], value + moved, atol=1e-9)


# ---- intervals, by hand
def test_the_interval_over_videos_is_the_normal_one():
    """Half of 400 videos: .5 +- 1.96 * .5 / 20."""
    values = np.arange(400)[None] % 2
    assert report.confidence_interval(values) == pytest.approx([.5 - .049, .5 + .049], abs=.004)
    assert report.confidence_interval(values, 3 * values + 1) == pytest.approx(
        [-2 - .155, -2 + .155], abs=.012)                       # sqrt(1 + 9) as wide
    assert report.confidence_interval(np.full((3, 5), 2.0)) == [2, 2]
    assert report.confidence_interval(np.ones((2, 3)), np.full((2, 7), 4.0)) == [-3, -3]


def test_one_seed_fewer_is_drawn_than_there_are():
    """Three of 0, 1, 2, 3: their sum is 0 in 1 of 64 draws, at most 1 in 4: the quantile of .025 is 1, above
    3 it mirrors."""
    values = np.arange(4.0)[:, None] * np.ones((1, 6))
    assert report.confidence_interval(values) == pytest.approx([1 / 3, 3 - 1 / 3])
    two = np.array([[-1, 1] * 50, [9, 11] * 50])        # one of two: half of N(0, .1), half of N(10, .1)
    assert report.confidence_interval(two) == pytest.approx([-.1645, 10.1645], abs=.015)
    found = report.summary(values)
    assert found["mean"] == 1.5 and found["seeds"] == [0, 1, 2, 3]
    assert found["interval"] == report.confidence_interval(values)


def test_verdicts_on_claims():
    values = {"a": np.full((2, 4), 3.0), "b": np.array([[1.0] * 4, [2.0] * 4]),
              "c": np.array([[9.0, 0, 9, 0]] * 2)}
    first, second, third = report.claim_verdicts([("a", "b"), ("b", "a", "no"), ("a", "c", "less")], values)
    assert first == {"claim": "a above b", "paper": "yes", "difference": 1.5, "interval": [1, 2],
                     "seeds": [2, 1],
                     "verdict": "holds"}
    assert second["paper"] == "no" and second["verdict"] == "does not hold"
    assert third["verdict"] == "cannot be told"
    (unpaired,) = report.claim_verdicts([("a", "c")], {"a": values["a"][:, :3], "c": values["c"]},
                                        paired=False)
    interval = report.confidence_interval(values["a"][:, :3], values["c"])
    assert unpaired["difference"] == -1.5 and unpaired["interval"] == interval
    assert [report.verdict(*ends) for ends in ((0, 1), (-1, 0), (.1, 1), (-1, -.1))] == [
        "cannot be told", "cannot be told", "holds", "does not hold"]
    assert report.verdict(.1, 1, at=.5) == "cannot be told"
    lines = report.claims_table([first])
    assert lines == ["| ordering | the paper's | difference | by seed | verdict on this ordering |",
                     "|---|---|---|---|---|",
                     "| a above b | yes | +1.500 [+1.000, +2.000] | +2.000 +1.000 | holds |", ""]
    assert report.show(.25, (.1, .4)) == "0.250 [0.100, 0.400]"


def test_a_panel_beside_the_other(tmp_path):
    pytest.importorskip("matplotlib")
    for _ in range(2):
        report.plot(tmp_path / "new/a.png",
                    {"left": ("x", {"one": ([0, 1], [1, 0])}), "right": ("t", {"two": ([0], [1])})})
    report.plot(tmp_path / "b.png", {"left": ("x", {"one": ([0, 1], [0, 1])}),
                                     "right": ("t", {"two": ([0], [1])})})
    assert (tmp_path / "b.png").read_bytes() != (tmp_path / "new/a.png").read_bytes()
    assert not pytest.importorskip("matplotlib.pyplot").get_fignums()
    with av.open(str(tmp_path / "new/a.png")) as file:
        assert (file.streams.video[0].width, file.streams.video[0].height) == (2 * 4 * 110, 374)
