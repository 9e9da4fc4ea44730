"""report.py's influence values against automatic differentiation of the weighted statistic."""
import numpy as np
import pytest
import torch

import report


def influence(statistic, n):
    """n times the derivative of statistic(weights [n]) at equal weights: how much one video more would move it."""
    weights = torch.ones(n, dtype=torch.float64, requires_grad=True)
    value = statistic(weights)
    return value.item(), n * torch.autograd.grad(value, weights)[0].numpy()


@pytest.mark.parametrize("name", ["auc", "balanced"])
def test_values_are_the_statistic_and_what_each_video_moves_it_by(name):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 30, generator=g).round(decimals=1), (torch.rand(2, 30, generator=g) < 0.3).long()
    right = ((logits >= 0) == (labels == 1)[:, None]).double()
    found = report.auc_values(logits, labels) if name == "auc" else report.balanced_values(right.numpy(), labels)
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
