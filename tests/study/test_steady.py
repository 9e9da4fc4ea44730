"""study/steady.py: its parts' commands, and what `steady` and `speed` make of runs whose numbers are
known."""
import json
from functools import partial

import numpy as np
import pytest

import report
from study import parts, reproduce, steady, stopping

STEADY = "--rollout_passes 4 --reward_loss logsigmoid"


def work_in(tmp_path, name="steady", **how):
    return parts.Work(reproduce.Config(name, output_dir=str(tmp_path / "parts"),
                                       results_dir=str(tmp_path / "results"), **how))


def test_the_commands_of_parts(tmp_path):
    work, seed = work_in(tmp_path, preset="full"), f"{tmp_path}/parts/full/seed-1"
    of = lambda run: " ".join(map(str, steady.part_of_run(work, 1, run)))
    train = ("transformer/config.json train_align.py --method prfl --seed 1 "
             f"--curated_dir {seed}/curated --reward {seed}/reward/reward")
    constant, checks = "--lr_scheduler constant", "--validation_steps 40 --num_validation 256"
    name = STEADY.replace("--", "").replace(" ", "-")
    assert of(steady.Run(steady.STEADY)) == (
        f"{seed}/steady-{name} {train} --learning_rate 0.0001 {constant} --max_train_steps 480 "
        f"{checks} {STEADY}")
    assert of(steady.Run(("--learning_rate", 3e-5, *steady.STEADY))) == (
        f"{seed}/steady-learning_rate-3e-05-{name} {train} {constant} --max_train_steps 480 {checks} "
        f"--learning_rate 3e-05 {STEADY}")
    assert of(steady.Run((*parts.I2V, *steady.STEADY))).split("--learning")[0] == (
        f"{seed}/steady-task-i2v-{name} transformer/config.json train_align.py --method prfl --seed 1 "
        f"--curated_dir {seed}/curated-task-i2v --reward {seed}/reward-task-i2v/reward ")
    assert of(steady.Run(("--variant", "pull"), "why")) == (f"{seed}/why-variant-pull "
        f"transformer/config.json -m study.why --seed 1 --curated_dir {seed}/curated --reward "
        f"{seed}/reward/reward --learning_rate 0.0001 {constant} --max_train_steps 480 {checks} "
        "--variant pull")
    refl, sft = (steady.racers(work)[row] for row in ("RGB ReFL, all frames, steady recipe", "SFT"))
    reward = f"{seed}/reward-space-rgb-frames_decoded-all/reward"
    assert f"--method refl --seed 1 --curated_dir {seed}/curated --reward {reward}" in of(refl)
    assert "--method sft" in of(sft) and "--reward" not in of(sft)
    assert "--learning_rate 0.0003 --num_validation 256" in of(sft).replace(f"{constant} ", "")


def test_every_comparison_differs_in_what_its_row_says(tmp_path):
    work = work_in(tmp_path)
    compared = steady.steady_comparisons(work) | steady.why_comparisons(work)
    eight = {(run.name, run.flags[-4:]) for run in compared["Rewarded step, rollout, loss"].values()}
    assert len(eight) == 8 and {("steady", steady.PAPER), ("steady", steady.STEADY)} <= eight
    assert {run.name for run in compared["Rewarded step, rollout, loss"].values()
            if "per_video" in run.flags} == {"why"}
    runs = {run for rows in compared.values() for run in rows.values()}
    assert set(steady.RECIPES.values()) <= {run.flags for run in runs}
    # no recipe is run a second time without --keep
    assert not {steady.PAPER, steady.STEADY} & {run.flags for run in runs}
    assert len({steady.folder_of(work, 0, run) for run in runs}) == len({run[:2] for run in runs})


def test_seconds_to_a_level_by_hand():
    rows = [{"validation_qualified": 0.3},
            {"sft_cpu_seconds": 1.0, "reward_cpu_seconds": 2.0, "sft_seconds": 99.0},
            {"sft_cpu_seconds": 0.5, "reward_cpu_seconds": 2.5, "validation_qualified": 0.9},
            {"sft_cpu_seconds": 1.0}, {"validation_qualified": 0.85}]
    found = steady.quality_over_seconds(rows)
    assert found == [(0, 0.3), (6.0, 0.9), (7.0, 0.85)]
    assert [steady.seconds_to(level, found) for level in (0.3, 0.8, 0.9, 0.95)] == [0, 6.0, 6.0, None]


def rate_at(folder, step):
    """A made-up curve: what falls by the paper's recipe stays by the steady one, and RGB ReFL never gets to
    .80."""
    seed = int(folder.parent.name[-1]) / 100
    if "refl" in folder.name or "sft" in folder.name:
        return min(0.7, 0.3 + step / 100) + seed
    falls = "per_video" not in folder.name and "rollout_passes-0" in folder.name
    best = 0.9 if falls or "recipe-paper" in folder.name else 0.96
    return (0.3 if not step else 0.5 if falls and step > 200 else best) + seed


@pytest.fixture
def made_up(monkeypatch):
    """Parts are not run but made up: metrics.jsonl, checkpoints, evaluations. -> the folders that were asked
    for."""
    asked = []

    def run(self, wanted, jobs=None):
        for folder, last, *command in wanted:
            asked.append(folder)
            if (folder / last).exists():
                continue
            flag = lambda name: int(command[command.index(name) + 1])
            if "--num_validation" in command:
                n, every = flag("--max_train_steps"), flag("--validation_steps")
                slow = 0.5 if "recipe-steady" in folder.name else 2.0
                rows = [{"step": 0, "validation_qualified": rate_at(folder, 0)}] + [
                    {"step": step, "sft_cpu_seconds": slow / 2, "reward_cpu_seconds": slow / 2}
                    | ({"validation_qualified": rate_at(folder, step)} if step % every == 0 else {})
                    for step in range(1, n + 1)]
                for step in range(every, n + 1, every):
                    (folder / f"checkpoint-{step:06d}").mkdir(parents=True)
                (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / last).parent.mkdir(parents=True, exist_ok=True)
            (folder / last).write_text("{}")

    def evaluations(work, name, rows_of, flags=()):
        asked.append((name, *flags))
        good = lambda row: {"base": 0.35, "PRFL, steady recipe, at the end": 0.97, "clean renders": 0.99}.get(
            row, 0.9 if name.endswith("at-its-best") else 0.8 if "best-of" in name else 0.3)
        passed = lambda row: 1.0 * (np.arange(512) < 512 * good(row))
        values = lambda row: {**dict.fromkeys(steady.COLUMNS[:4], passed(row)), "speed": np.full(512, 0.05),
                              "brightness": np.full(512, 0.2), "saturation": np.full(512, 0.1)}
        for rows in rows_of.values():
            for row, folder in rows.items():
                assert row == "base" or (
                    folder.name == "checkpoint-000040") == name.endswith("at-its-best"), (row, folder)
        return [{row: values(row) for row in (*rows, "clean renders")} for rows in rows_of.values()]

    monkeypatch.setattr(parts.Work, "run", run)
    monkeypatch.setattr(steady, "evaluations", evaluations)
    quick = partial(report.confidence_interval, rounds=200)     # these intervals are wide of every verdict
    for module in (report, reproduce):
        monkeypatch.setattr(module, "confidence_interval", quick)
    return asked


def test_steady_tells_what_holds(tmp_path, made_up):
    steady.steady(work_in(tmp_path, preset="full"))
    text, found = (tmp_path / "results/steady.md").read_text(), json.loads(
        (tmp_path / "results/steady.json").read_text())
    end, best = "PRFL, steady recipe, at the end", "PRFL, paper's recipe, stopped at its best"
    assert f"| {end} above {best} | not in it | +0.070" in text
    assert [so for *_, so in found["asked"]] == ["yes"] * 5
    row = next(line for line in text.splitlines() if line.startswith("| the paper's recipe"))
    assert row == ("| the paper's recipe | 0.910 | 0.910 | 0.910 | 0.510 | 0.510 | 0.910 | "
                   "**0.510** | 0.500 0.510 0.520 |")


def test_why_makes_one_seed_where_it_says_so(tmp_path, made_up):
    steady.why(work_in(tmp_path, preset="full"))
    text = (tmp_path / "results/why.md").read_text()
    assert f"| twice as long |{' 0.960 |' * 7} **0.960** | 0.960 |" in text
    assert "| step per batch, at most 4 passes, -log sigmoid (the steady recipe) | 0.970 |" in text
    assert {folder.parent.name for folder in made_up if "960" in folder.name} == {"seed-0"}


def test_what_was_asked_can_fail(tmp_path, made_up):
    work = work_in(tmp_path, preset="full")
    values = lambda q, speed: {"qualified": 1.0 * (np.arange(512) < 512 * q), "speed": np.full(512, speed),
                               "brightness": np.ones(512), "saturation": np.ones(512)}
    found = [{"PRFL, steady recipe, at the end": values(0.94, 0.056), "clean renders": values(1, 0.05)}] * 3
    verdict = [{"difference": 0.0, "interval": [-0.1, 0.1], "verdict": "cannot be told"}]
    curves = [{40: 0.9, 480: 0.9}, {40: 0.95, 480: 0.91}, {40: 0.9, 480: 0.9}]
    asked = steady.expectations(work, found, curves, {"3e-05": [{240: 0.85}], "0.0003": [{240: 0.9}]},
                                verdict)
    assert [so for *_,
        so in asked] == ["no"] * 5 and "speed +12.0%" in asked[3][1] and asked[1][1] == "0.000 0.040 0.000"


def test_speed_counts_cpu_seconds(tmp_path, made_up, monkeypatch):
    monkeypatch.setattr(steady, "wan_flops", lambda *how: 1e15 * len(how))
    steady.speed(work_in(tmp_path, "speed", preset="full"))
    text, found = (tmp_path / "results/speed.md").read_text(), json.loads(
        (tmp_path / "results/speed.json").read_text())
    # .90 and more from the first validation on, 10 iterations of 2 and of 1/2 seconds; .95 by the steady one
    # alone
    assert "| PRFL, paper's recipe | 20 | 20 | 20 | never | 0.910 | 0.910 | 320 | 160 |" in text
    assert "| PRFL, steady recipe | 5 | 5 | 5 | 5 | 0.970 | 0.970 | 80 | 160 |" in text
    # one seed
    assert "| RGB ReFL, first frame, paper's recipe | never | never | never | never | 0.700 |" in text
    assert "| SFT | never" in text and found[
        "ratio_at_.90"] == 0.25 and "takes 0.25 of the paper recipe's" in text
    assert "| RGB ReFL, all frames, steady recipe | 3.0 |" in text
    # as its runs
    assert {folder.parent.name for folder in made_up if "reward-space-rgb" in folder.name} == {"seed-0"}


def test_what_a_judge_loses_by_hand():
    found = [(0.43, 0.1, 0.3), (0.81, 0.2, 0.8), (0.85, 0.25, 0.88), (0.87, 0.4, 0.4)]
    rows = [{"step": 40 * k, "validation_judge": judge, "validation_judge_other_prompt": other,
             "validation_qualified": rate} for k, (judge, other, rate) in enumerate(found)]
    found = stopping.choice([{"step": 1, "reward": 2.0}, *rows])
    assert np.allclose(found["curves"]["score"], [0.38, 0.71, 0.725, 0.67])
    assert (found["chosen"], found["best"], found["steps"]) == (80, 80, [0, 40, 80, 120])
    assert found["lost"] == 0 and np.allclose([found["lost_by_opinion"], found["lost_at_end"]], 0.48)


def test_each_seeds_judge_is_the_next_ones_reward_model(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(parts.Work, "run", lambda self, wanted, jobs=None: asked.extend(wanted))
    stopping.train(work_in(tmp_path, "stopping", preset="quick"))
    rewards, run = {str(folder) for folder, *_ in asked if folder.name == "reward"}, asked[-1]
    at = f"{tmp_path}/parts/quick"
    assert rewards == {f"{at}/seed-0/reward", f"{at}/seed-1/reward"}       # one seed has a judge all the same
    words = " ".join(map(str, run[1:]))
    assert f"--reward {at}/seed-0/reward/reward --judge {at}/seed-1/reward/reward --rollout_passes 0" in words
    assert "--max_train_steps 160 --validation_steps 40 --num_validation 128" in words
