"""study/endurance.py: the commands of its runs, what is kept of them, and the fall from the best quarter by
hand."""
import json

import numpy as np
import pytest

from common import InputError
from study import endurance, few_labels, parts, reproduce, second_round
from study.endurance import Case


def work_in(tmp_path, **how):
    return parts.Work(reproduce.Config("steady", output_dir=str(tmp_path / "parts"),
                                       results_dir=str(tmp_path / "results"), **how))


def test_the_commands_of_runs(tmp_path):
    work, seed = work_in(tmp_path, preset="full"), f"{tmp_path}/parts/full/seed-1"
    of = lambda case: " ".join(map(str, endurance.part_of_case(work, 1, case)))
    assert of(Case("paper", "linear", 0.25, 2e-4, 480)) == (
        f"{seed}/endurance-paper_linear_0.0002_mismatched-0.25_480_seed-1 transformer/config.json "
        f"train_align.py --method prfl --recipe paper --seed 1 --curated_dir {seed}/curated --reward "
        f"{seed}/reward-mismatched-0.25/reward --judge "
        f"{tmp_path}/parts/full/seed-2/reward-mismatched-0.25/reward --learning_rate 0.0002 "
        f"--lr_scheduler linear --max_train_steps 480 --validation_steps 40 --num_validation 256 "
        f"--checkpointing_steps 120")
    by_video = of(Case("by video", mismatched=0))
    assert "-m study.why --rewarded_step per_video --rollout_passes 4 --reward_loss logsigmoid" in by_video
    assert f"--reward {seed}/reward/reward " in by_video                # the other tables' reward model


def test_the_reward_model_of_few_labels(tmp_path):
    work, case = work_in(tmp_path, preset="full"), few_labels.CASES[2]
    assert (case.parts, case.reward_steps) == (20, 800)
    folder, _, *command = endurance.part_of_case(work, 0, case)
    assert folder.name.endswith("mismatched-0.25-1-of-20-800-steps_480_seed-0")
    made = []
    work.run = made.extend
    parts.train_reward_models(work, [(0, case.reward_flags())])
    reward, *_ = {str(part[0]): part for part in made}.values()
    said = " ".join(map(str, reward))
    assert said.count("--max_train_steps") == 1 and said.endswith(
        "--mismatched 0.25 --fold 1/20 --max_train_steps 800")
    assert str(reward[0] / "reward") == str(command[command.index("--reward") + 1])


def test_the_table_of_few_labels(tmp_path):
    full, few = few_labels.Case("steady", "linear", 0.25, 2e-4, 480), few_labels.CASES[2]
    reward = {"trained_on": 516, "held_out": 128, "clean": {"accuracy": 0.77, "prompt_auc": 0.9}}
    kept = {full.name(0): kept_run(490, [0.9] * 12),
            few.name(0): kept_run(460, [0.8] * 12) | {"reward": reward}}
    few_labels.report(work_in(tmp_path, preset="full"), kept)
    text = (tmp_path / "results/few_labels.md").read_text()
    assert "| 644 | 0.25 | 1 | 0.770 | 0.800 |" in text and "| all | 0.25 | 1 |  | 0.900 |" in text
    assert "2 of 14 runs are made" in text


def test_the_parts_of_a_second_round(tmp_path, monkeypatch):
    """The aligned generator's samples come from the first round's; both rounds train the second reward."""
    work, made = work_in(tmp_path, preset="full", seeds=1), []

    def run(self, wanted):
        for folder, last, *words in wanted:
            made.append((folder.name, " ".join(map(str, words)).replace(f"{work.folder}/seed-0/", "")))
            (folder / last).parent.mkdir(parents=True, exist_ok=True)
            (folder / last).write_text(json.dumps(
                {"trained_on": 600, "held_out": 100, "clean": {"accuracy": 0.8}}))
    good = kept_run(480, [0.9] * 12)
    monkeypatch.setattr(endurance, "HOME", tmp_path)
    monkeypatch.setattr(parts.Work, "run", run)
    monkeypatch.setattr(second_round, "read_metrics", lambda folder: [])
    monkeypatch.setattr(second_round, "curve_of", lambda rows: good["curve"])
    monkeypatch.setattr(second_round, "test_verdicts", lambda transformer: good["test"])
    second_round.second_round(work)
    said = dict(made)
    assert len(said) == 9
    assert said["second_round-samples-2"] == (
        "-m study.samples --transformer second_round-aligned-0/transformer --count 1024 --seed 101")
    assert "--transformer" not in said["second_round-samples-1"] + said["second_round-samples-0"]
    assert said["second_round-reward-2"].startswith(
        "train_reward.py --data second_round-samples-0/shards second_round-samples-2/shards --seed 0")
    assert "--reward second_round-reward-2/reward" in said["second_round-aligned-2"]
    count = len(made)
    second_round.second_round(work)
    assert len(made) == count                                           # nothing is made twice
    rows = json.loads((tmp_path / "results/second_round.json").read_text())["rows"]
    assert rows[second_round.ALIGNED]["labelled"] == 700


def test_two_rounds_of_samples_train_one_reward(tmp_path, monkeypatch):
    """For real, in small: the shards of both rounds lie where train_reward.py is told to read them."""
    work = work_in(tmp_path, seeds=1)
    monkeypatch.setattr(second_round, "SAMPLES", 64)
    monkeypatch.setattr(second_round, "REWARD_STEPS", 1)
    first, *_ = second_round.parts_of(work, 0, second_round.FIRST)
    more, reward, _ = second_round.parts_of(work, 0, second_round.MORE)
    for part in (first, more, reward):
        work.run([part])
    report = json.loads((reward[0] / "report.json").read_text())
    assert 64 < report["trained_on"] + report["held_out"] <= 128


def test_the_judge_is_the_next_seeds_reward_model(tmp_path):
    work = work_in(tmp_path, preset="full")
    wanted = [(0, Case("steady")), (0, Case("paper")), (2, Case("paper"))]
    flags = ("--mismatched", 0.25)
    assert endurance.reward_models(work, wanted) == [(0, flags), (1, flags), (2, flags)]
    assert endurance.judge_seed(work_in(tmp_path, preset="quick"), 0, Case("paper")) == 1


def test_where_a_judge_would_have_stopped(tmp_path):
    """The annotator's best is at 40, the score's choice too, the opinion's is the end."""
    rows = {"0": (0.3, 0.4, 0.1), "40": (0.9, 0.8, 0.2), "80": (0.5, 0.9, 0.8)}
    curve = {step: {"qualified": rate, "judge": judge, "judge_other_prompt": other}
             for step, (rate, judge, other) in rows.items()}
    case = Case("paper", length=480)
    kept = {case.name(0): {"curve": curve}, case.name(1): {"curve": {}}}
    numbers, cells = endurance.stopped_by_the_judge(work_in(tmp_path, preset="full"), kept, [case])
    assert numbers[case.name(0)] == {"best": 40, "score": 40, "lost": 0.0, "opinion": 80,
                                     "lost_by_opinion": pytest.approx(0.4), "lost_at_end": pytest.approx(0.4)}
    assert cells == [[case.name(0), 40, 40, "0.000", 80, "0.400", "0.400"]]


def test_every_case_has_a_name_and_a_row_of_its_own():
    cases = [*endurance.THREE_SEEDS, *endurance.ONE_SEED]
    assert len({case.name(0) for case in cases}) == len(
        {(case.row(), case.length) for case in cases}) == len(cases)


def test_the_seeds_of_a_case(tmp_path):
    full, quick = (work_in(tmp_path, preset=preset) for preset in ("full", "quick"))
    seeds = lambda work, case: list(endurance.seeds_of(work, case, endurance.ONE_SEED))
    assert seeds(full, endurance.THREE_SEEDS[0]) == [0, 1, 2] and seeds(full, endurance.ONE_SEED[0]) == [1]
    assert seeds(quick, endurance.THREE_SEEDS[0]) == seeds(quick, endurance.ONE_SEED[0]) == [0]


def test_a_curve_counts_the_seconds_of_updates_alone():
    rows = [{"step": 0, "validation_qualified": 0.3, "validation_speed": 0.045678},
            {"step": 1, "sft_cpu_seconds": 1.0, "reward_cpu_seconds": 2.25, "sft_seconds": 9.0,
             "reward": 1.0}, {"step": 2, "sft_cpu_seconds": 0.5, "reward": 2.0, "validation_qualified": 0.5}]
    assert endurance.curve_of(rows) == {
        "0": {"qualified": 0.3, "speed": 0.0457, "cpu_seconds": 0.0},
        "2": {"qualified": 0.5, "reward": 2.0, "cpu_seconds": 3.8}}


def curve(values):
    return {str(40 * i): {"qualified": value} for i, value in enumerate([0.3, *values])}


def test_the_fall_is_from_the_best_quarter_by_hand():
    falling = [curve([0.8, 0.8, 0.9, 0.9, 0.96, 0.96, 0.7, 0.7]),
               curve([0.8, 0.8, 0.9, 0.9, 0.94, 0.94, 0.8, 0.8])]
    difference, (low, high) = endurance.fall(falling)
    assert difference == pytest.approx(0.75 - 0.95) and low < difference < high < -0.1
    rising = [curve([0.8, 0.8, 0.85, 0.85, 0.9, 0.9, 0.95, 0.95])]
    assert endurance.fall(rising) == (0.0, [0.0, 0.0])
    flat = [curve([0.9, 0.9, 0.95, 0.95, 0.94, 0.94, 0.94, 0.94])]
    assert endurance.fall(flat)[0] == pytest.approx(-0.01)
    assert endurance.fall([curve([0.9, 0.95, 0.96])]) is None                   # a run too short to say so


def kept_run(good, rates):
    bits = "1" * good + "0" * (endurance.TESTED - good)
    verdicts = dict.fromkeys(("qualified", "physical", "deformity", "adherent"), bits)
    test = {f"{split}, {who}": verdicts for split in ("test", "reworded")
            for who in ("strict", "firm", "loose")}
    return {"command": "x", "commit": "y", "minutes": 1.0, "curve": curve(rates),
            "test": test | {"test means": [0.05, 0.2, 0.1], "reworded means": [0.05, 0.2, 0.1]}}


def test_what_is_kept_is_not_made_again_and_makes_the_table(tmp_path, monkeypatch):
    cases = [Case("steady"), Case("paper", "linear")]
    monkeypatch.setattr(endurance, "THREE_SEEDS", cases)
    monkeypatch.setattr(endurance, "ONE_SEED", [])
    monkeypatch.setattr(endurance, "HOME", tmp_path)
    monkeypatch.setattr(parts.Work, "run", lambda self, wanted, jobs=None: pytest.fail(f"ran {wanted}"))
    kept = {case.name(seed): kept_run(500 - 50 * i - seed, [0.9 - i / 10] * 8)
            for i, case in enumerate(cases) for seed in range(3)}
    (tmp_path / "results").mkdir()
    (tmp_path / "results/endurance_runs.json").write_text(json.dumps(kept))
    monkeypatch.setattr(endurance, "train_reward_models", lambda work,
                        wanted: wanted and pytest.fail(f"made {wanted}"))
    endurance.endurance(work_in(tmp_path, preset="full"))
    found = json.loads((tmp_path / "results/endurance.json").read_text())["rows"]
    steady, paper = found.values()
    assert steady["test"]["test, firm"]["mean"] == pytest.approx(np.mean([500, 499, 498]) / 512)
    assert paper["test"]["test, firm"]["seeds"] == pytest.approx([450 / 512, 449 / 512, 448 / 512])
    assert steady["validation"]["40"] == [0.9] * 3 and steady["speed"]["mean"] == pytest.approx(0.05)
    text = (tmp_path / "results/endurance.md").read_text()
    assert "| steady, constant 0.0001, mismatched 0.25 | 960 | 3 | 0.900 |" in text


def test_damaged_results_are_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    path = tmp_path / "results/endurance_runs.json"
    path.write_text('{"half')
    with pytest.raises(InputError, match="endurance_runs.json is damaged"):
        endurance.finished(work_in(tmp_path), [])
    assert path.read_text() == '{"half'
