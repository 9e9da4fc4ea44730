"""Mismatched prompts: which prompt a video is given, what the reward model makes of it, and what report.json
says."""
import json
from collections import Counter

import pytest
import torch
from tiny import command, run

import common
import data
import validation
from common import InputError
from world import scene


def test_prompts_are_alike_by_meaning_or_by_words():
    alike = [("a red circle moving right", "one red circle travelling to the right"), ("A  cat", "a cat"),
             ("", " ")]
    for one, other in alike:
        assert scene.meaning(one) == scene.meaning(other), one
    different = ["a red circle moving right", "a red circle moving left", "a red square moving right",
                 "a blue circle moving right", "a red circle", "a cat", "a cat sleeps", ""]
    assert data.prompt_groups(different).tolist() == list(range(8))
    assert data.prompt_groups([prompt for pair in alike for prompt in pair]).tolist() == [0, 0, 1, 1, 2, 2]


def test_another_videos_prompt_is_never_alike_and_each_is_as_likely():
    groups = torch.tensor([0, 1, 0, 2, 2, 2, 1, 0])
    for row in range(8):
        drawn = data.other_rows(groups, torch.full((4000,), row), 0, row, range(4000)).tolist()
        others = [i for i in range(8) if groups[i] != groups[row]]
        counts = Counter(drawn)
        assert set(counts) == set(others)
        expected = 4000 / len(others)
        chi2, free = sum((counts[i] - expected) ** 2 / expected for i in others), len(others) - 1
        assert abs(chi2 - free) < 5 * (2 * free) ** 0.5
    with pytest.raises(InputError, match="all prompts are alike"):
        data.other_rows(torch.zeros(3, dtype=torch.long), torch.tensor([1]), 0, 0, [0])


def test_another_videos_prompt_depends_on_seed_step_and_place_only():
    groups, rows = torch.arange(50) % 7, torch.arange(20)
    whole = data.other_rows(groups, rows, 3, 5, range(20))
    halves = [data.other_rows(groups, rows[j:j + 10], 3, 5, range(j, j + 10)) for j in (0, 10)]
    assert torch.equal(torch.cat(halves), whole)
    for seed, step in ((4, 5), (3, 6)):
        assert not torch.equal(data.other_rows(groups, rows, seed, step, range(20)), whole)


class Reader(torch.nn.Module):
    """A reward whose logit is the video's first value times (how much it reads) the prompt's, less one
    half."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def forward(self, x, t, context):
        fits = (x[:, 1].mean((1, 2, 3)) - context[:, 0, 0]).abs() < 0.5
        return torch.where(fits | torch.tensor(not self.reads), 1.0, -1.0) * 3


@pytest.mark.parametrize("reads", [True, False])
def test_the_report_says_whether_a_reward_reads_its_prompt(reads, monkeypatch):
    """The second channel holds the number of the prompt, and noise is left out, so that the truth is
    known."""
    monkeypatch.setattr(validation, "add_noise", lambda x0, x1, t: x0)
    numbers = torch.arange(12.) % 4
    latents = torch.zeros(12, 2, 1, 1, 1)
    latents[:, 1] = numbers.view(12, 1, 1, 1)
    batch = {"latents": latents, "context": numbers.view(12, 1, 1).clone(), "label": torch.tensor([1, 0] * 6),
             "prompt": [f"prompt {int(i)}" for i in numbers]}
    config = type("Config", (), {"seed": 0, "batch_size": 2, "mismatched": 0.25})
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    said = []
    monkeypatch.setattr(validation.tqdm, "write", said.append)
    report, averages = validation.make_reward_report(Reader(reads), batch, {"model_type": "t2v"}, config,
                                                     runtime)()
    wanted = 1.0 if reads else 0.5
    assert report["prompt_auc"] == [wanted] * 5 and report["prompt_accuracy"] == [wanted] * 5
    assert report["clean"]["prompt_auc"] == wanted and averages["held_out_prompt_auc"] == wanted
    assert report["accuracy"] == [0.5] * 5 and report["clean"]["accuracy"] == 0.5  # it calls all of them good
    assert ("hardly reads the prompt" in " ".join(said)) == (not reads)
    assert ("label more videos" in " ".join(said)) == (not reads)       # it had mismatched prompts already


def test_a_report_of_one_prompt_has_no_sensitivity():
    batch = {"latents": torch.zeros(4, 2, 1, 1, 1), "context": torch.zeros(4, 1, 1),
             "label": torch.tensor([1, 0, 1, 0]), "prompt": ["a cat"] * 4}
    config = type("Config", (), {"seed": 0, "batch_size": 2, "mismatched": 0.25})
    runtime = common.Runtime(0, 1, torch.device("cpu"), torch.float32)
    report, _ = validation.make_reward_report(Reader(True), batch, {"model_type": "t2v"}, config, runtime)()
    assert report.keys() == {"accuracy", "balanced_accuracy", "auc", "clean"} and len(report["clean"]) == 3
    json.dumps(report)


def test_of_a_video_whose_prompt_is_borrowed_only_the_prompt_is_read(folder, cpu, monkeypatch):
    """Latents are large, and those of the other video are not used."""
    read, batch = [], data.Shards.batch
    monkeypatch.setattr(data.Shards, "batch", lambda shards, indices, names=None: read.append(names) or batch(
        shards, indices, names))
    run(*command(folder, "reward", "borrowed", "--mismatched", "0.5", "--max_train_steps", "3"))
    assert read == [None, *[None, ["context"]] * 3]             # the held-out videos, then three steps
