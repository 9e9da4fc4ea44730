"""study/search.py: a replay is what search.best_of does; the tables, from candidates whose best is known."""
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import generator

import common
import flow
import report
import search as best_of_n
from pavrm import PAVRM
from study import candidates, endurance, parts, search_mismatched
from study import search as study
from world import annotator

SHAPE = (16, 2, 4, 4)


@pytest.mark.parametrize("n, cuts", [(1, None), (4, None), (6, None),
                                     (6, "0:1"), (6, ".75:3,.38:2"), (6, ".19:1")])
def test_a_replay_is_what_best_of_does(n, cuts):
    dit, context = generator(), torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    pavrm = PAVRM.from_generator(dit, 1)
    cuts = best_of_n.parse_drops(n, cuts)
    wanted, passes = best_of_n.best_of(dit, pavrm, SHAPE, context, 7, range(3), study.STEPS, n, cuts)
    x_T = torch.cat([common.noise(SHAPE, 7, "sample", k, [i]) for i in range(3) for k in range(n)])
    x, rewards = candidates.sample_and_reward(dit, pavrm, x_T, context.repeat_interleave(n, 0), study.STEPS,
                                              guidance=0.0)
    chosen = study.replay(rewards.unflatten(0, (3, n)), cuts)
    torch.testing.assert_close(x.unflatten(0, (3, n))[range(3), chosen], wanted, atol=1e-4, rtol=1e-4)
    assert study.passes_of(cuts, 1 / 2) == passes


def test_guidance_moves_x_along_the_rewards_gradient():
    """A reward that is linear in x, under no velocity: what is left is the sum of the steps at t <= 1/2."""
    w, x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(2, *SHAPE)
    linear = lambda x, t, context: (x * w).flatten(1).sum(1)
    still = lambda x, t, context: torch.zeros_like(x)
    x, rewards = candidates.sample_and_reward(still, linear, x_T, torch.zeros(2, 3, 8), 16, 2.0)
    moved = sum(1 / 16 * 2.0 * t / (1 - t) for t in (k / 16 for k in range(1, 9)))
    torch.testing.assert_close(x, (moved * w).expand(2, *SHAPE))
    torch.testing.assert_close(rewards[:, -1], (moved * w.square().sum()).expand(2))
    assert torch.equal(rewards[:, :2], torch.zeros(2, 2))               # t = .75 and .56: nothing moved yet
    assert flow.schedule(16).tolist()[::4] == [1, 0.75, 0.5, 0.25, 0]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Candidates of 40 videos and three seeds. The reward at the end knows which are qualified, the earlier
    ones do not.

    The draws depend on the part's name and not on where the test runs.
    """
    def run(wanted):
        for folder, last, *words in wanted:
            flags = dict(zip(words[::2], words[1::2]))
            n, g = flags.get("--count", 8), common.random_generator(str(folder.relative_to(tmp_path)))
            folder.mkdir(parents=True, exist_ok=True)
            good = (torch.rand(40, n, generator=g) < (0.3 if "base" in folder.name else 0.6)).float()
            rewards = torch.randn(40, n, len(study.REWARDED), generator=g)
            rewards[..., -1] += 100 * good
            # the firm annotator passes this, the strict one does not
            found = {name: 0.9 * annotator.LIMITS[name][0] * torch.ones(40, n) for name in annotator.LIMITS}
            for name in ("speed", "dynamic", "brightness", "saturation"):
                found[name] = 0.05 * torch.ones(40, n)
            found |= {"rewards": rewards, "adherent": good, "absent": 0 * good, "qualified": good.clone()}
            save_file(found, folder / last)
    monkeypatch.setattr(study, "curve", lambda work, seed, run: {40: 0.9, 80: 0.9 - seed / 100})
    monkeypatch.setattr(study, "train_recipes", lambda work: None)
    monkeypatch.setattr(study, "train_aligned", lambda work, runs: None)
    monkeypatch.setattr(study, "stopped_at_its_best", lambda folder: folder / "checkpoint-000080")
    monkeypatch.setattr(parts.Work, "run", lambda self, wanted: run(wanted))
    monkeypatch.setattr(report, "confidence_interval", partial(report.confidence_interval, rounds=200))
    made = parts.Work(SimpleNamespace(preset="full", output_dir=tmp_path / "runs",
                                      results_dir=tmp_path / "results", seeds=None))
    made.preset = made.preset | {"videos": 40}
    return made


def test_tables_of_the_search(work, tmp_path):
    study.search(work)
    found = json.loads((tmp_path / "results/search.json").read_text())
    for row in study.ROWS:
        for n in (4, 8, 16):                                    # the last reward is always right
            assert found["rows"][row][f"best of {n} at the end"]["mean"] == found["any"][str(n)][row]["mean"]
        once, one = found["rows"][row]["best of 16 once, at t = .38"], found["rows"][row]["one sample"]
        assert abs(once["mean"] - one["mean"]) < 0.2
    assert found["passes"]["best of 8 in a chain"] == 70 and found["passes"]["best of 16 at the end"] == 272
    assert found["rows"]["base"]["one sample"]["mean"] == pytest.approx(0.3, abs=0.15)
    assert found["validation"]["PRFL, steady recipe"][2] == {"40": 0.9, "80": 0.88}
    assert found["once"]["0.0"]["base"]["mean"] == found["any"]["8"]["base"]["mean"]
    assert len(found["claims"][0]["seeds"]) == 3
    assert (tmp_path / "results/search.md").read_text().count("best of 8 in a chain") > 5


def test_the_search_by_rewards_that_saw_mismatched_prompts(work, tmp_path, monkeypatch):
    """Each part is kept as soon as it is made, and what is kept is not made again."""
    again = search_mismatched
    monkeypatch.setattr(endurance, "HOME", tmp_path)
    monkeypatch.setattr(again, "train_reward_models", lambda work, wanted: None)
    monkeypatch.setattr(again, "TESTED", 40)
    made, run = [], parts.Work.run

    def keep(self, wanted):
        wanted = [part for part in wanted if part[1] != "transformer/config.json"]    # not the alignments
        run(self, wanted)
        for folder, _, *words in wanted:
            made.append(folder)
            part = {"command": " ".join(map(str, words)), "commit": "c"}
            (folder / "part.json").write_text(json.dumps(part))
    monkeypatch.setattr(parts.Work, "run", keep)
    again.search_mismatched(work)
    again.search_mismatched(work)
    assert len(made) == len(set(made)) == 3 * len(again.CASES) * (1 + len(again.RESAMPLED))
    rows = json.loads((tmp_path / "results/search_mismatched.json").read_text())["rows"]
    assert rows["base, best of 16 at the end"]["mean"] == 1 and 0.2 < rows["base, one sample"]["mean"] < 0.45
    assert len(rows[f"{again.STEADY}, best of 4 in a chain"]["seeds"]) == 3
    assert 0.2 < rows["base, best of 8 resampled"]["mean"] < 0.45
    path = tmp_path / "results/search_mismatched_runs.json"
    kept = json.loads(path.read_text())
    del kept["base, seed 1"]["plans"]["best of 4 resampled"]    # made before this plan existed
    path.write_text(json.dumps(kept))
    again.search_mismatched(work)
    assert made[-1].name == "resampled-4-base-reward-mismatched-0.25" and len(made) == len(set(made)) + 1
    assert kept.keys() == {f"{row}, seed {seed}" for row in again.CASES for seed in range(3)}


def test_tables_of_other_annotators_and_wordings(work, tmp_path):
    study.fooled(work)
    found = json.loads((tmp_path / "results/fooled.json").read_text())["rows"]
    for split in ("test", "reworded"):
        assert all(found[f"{split}, strict"][row]["mean"] == 0 for row in study.ROWS)
    assert all(found["test, firm"][row] == found["test, loose"][row] for row in study.ROWS)
    assert found["test, strict"]["clean renders"]["mean"] < found["test, firm"]["clean renders"]["mean"]
    reworded = [found["reworded, firm"][row]["mean"] for row in ("SFT", "paper", "steady")]
    assert np.mean(reworded) == pytest.approx(0.6, abs=0.1)


def test_the_paper_recipe_is_stopped_where_validation_was_best(tmp_path):
    for step, value in ((0, 0.99), (40, 0.8), (80, 0.9), (120, 0.7)):
        (tmp_path / f"checkpoint-{step:06d}").mkdir()
        with (tmp_path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps({"step": step, "validation_qualified": value}) + "\n")
            f.write(json.dumps({"step": step + 1}) + "\n")
    assert study.stopped_at_its_best(tmp_path).name == "checkpoint-000080"
