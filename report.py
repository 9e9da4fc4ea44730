"""What results pages are made of: intervals over seeds and videos, verdicts on claims, tables, and curves.

Values are one number per seed and video, [seeds, videos] (the same videos in each seed). AUC and balanced
accuracy are not means over videos; `auc_values` and `balanced_values` give per-video values with the same
mean, and with the same spread when videos are resampled.
"""
from pathlib import Path

import numpy as np


def confidence_interval(values, other=None, rounds=5000):
    """95 % interval of the mean of values [seeds, videos], or of its difference from the mean of `other`,
    which has the same seeds but videos of its own. Seeds and videos are resampled, with replacement.

    One seed fewer is drawn than there are. This makes the seeds' part of the variance unbiased: as many draws
    as there are seeds, n, would give (n - 1) / n of it. Still, three seeds say little about this part, and
    with one seed only videos are resampled. Videos count as independent, though some share a sentence.
    """
    groups = [np.asarray(group, float) for group in (values, other) if group is not None]
    rng, found = np.random.default_rng(0), []
    for _ in range(rounds):
        seeds = rng.integers(0, len(values), max(1, len(values) - 1))
        means = [group[seeds][:, rng.integers(0, group.shape[1], group.shape[1])].mean() for group in groups]
        found.append(means[0] - sum(means[1:]))
    return [float(x) for x in np.quantile(found, (0.025, 0.975))]


def summary(values):
    """values [seeds, videos] -> {"mean", "interval", "seeds"}."""
    return {"mean": float(np.mean(values)), "interval": confidence_interval(values),
            "seeds": np.mean(values, 1).tolist()}


def show(mean, interval, sign="", **_):
    """A cell of a table. sign: "+" for a difference."""
    return f"{mean:{sign}.3f} [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def table(head, rows):
    """The lines of a Markdown table. rows: lists of cells, of which the first is the row's name."""
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


def verdict(low, high, at=0.0):
    """The verdict on the claim that a difference is above `at`, by the difference's interval."""
    if low > at:
        return "holds"
    return "does not hold" if high < at else "cannot be told"


def claim_verdicts(claims, values, paired=True):
    """claims [(better, worse)] of the paper, or [(better, worse, what the paper has instead)], and values
    {row: [seeds, videos]} -> [{"claim", "difference", "interval", "verdict", ...}]. paired: the rows have the
    same videos."""
    found = []
    for better, worse, *instead in claims:
        a, b = values[better], values[worse]
        low, high = confidence_interval(np.subtract(a, b)) if paired else confidence_interval(a, b)
        found.append({"claim": f"{better} above {worse}", "paper": instead[0] if instead else "yes",
                      "difference": float(np.mean(a) - np.mean(b)), "interval": [low, high],
                      "seeds": (np.mean(a, 1) - np.mean(b, 1)).tolist(), "verdict": verdict(low, high)})
    return found


def claims_table(found):
    rows = []
    for claim in found:
        seeds = " ".join(f"{difference:+.3f}" for difference in claim["seeds"])
        rows.append([claim["claim"], claim["paper"], show(claim["difference"], claim["interval"], "+"), seeds,
                     claim["verdict"]])
    return table(["ordering", "the paper's", "difference", "by seed", "verdict on this ordering"], rows)


def auc_values(logits, labels):
    """logits [seeds, 5, m], labels [seeds, m] -> [seeds, 5, m], whose mean over videos is the AUC, and whose
    spread is that of the AUC over resampled videos (the delta method)."""
    values = np.zeros(logits.shape)
    for seed, (found, label) in enumerate(zip(logits.double().numpy(), labels.numpy())):
        good = label == 1
        for i, x in enumerate(found):
            wins = (x[good][:, None] > x[~good]) + 0.5 * (x[good][:, None] == x[~good])         # [good, bad]
            area = wins.mean()
            values[seed, i, good] = area + (wins.mean(1) - area) / good.mean()
            values[seed, i, ~good] = area + (wins.mean(0) - area) / (1 - good.mean())
    return values


def balanced_values(right, labels):
    """right [seeds, 5, m], labels [seeds, m] -> [seeds, 5, m], whose mean over videos is balanced accuracy,
    and whose spread is that of balanced accuracy over resampled videos (the delta method)."""
    values = np.zeros_like(right)
    for label in (0, 1):
        mine = (labels == label)[:, None].double().numpy()                                  # [seeds, 1, m]
        share = mine.mean(2, keepdims=True)
        accuracy = (right * mine).mean(2, keepdims=True) / share                            # [seeds, 5, 1]
        values += (accuracy + mine * (right - accuracy) / share) / 2
    return values


def plot(path, panels):
    """A PNG of panels {title: (x label, {curve: (x, y)})} side by side."""
    try:
        import matplotlib
    except ImportError:
        return print(f"no {path}: `pip install matplotlib` draws the curves")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    # the names of the curves are below the panels, where they hide no curve
    height = 3.23 + 0.17 * max(len(curves) for _, curves in panels.values())
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), height), squeeze=False,
                                   layout="constrained")
    for axis, (title, (x_label, curves)) in zip(axes[0], panels.items()):
        for label, (x, y) in curves.items():
            axis.plot(x, y, marker=".", label=label)
        axis.set_title(title, fontsize="small")
        axis.set_xlabel(x_label)
        axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.17))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")
