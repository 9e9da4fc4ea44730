"""study/rivals.py: the commands of its runs, rates at equal CPU seconds, and the table of what is kept."""
import json

import numpy as np
import pytest

from report import confidence_interval
from study import endurance, parts, reproduce, rivals


def work_in(tmp_path, preset="full"):
    return parts.Work(reproduce.Config("rivals", preset, output_dir=str(tmp_path / "parts"),
                                       results_dir=str(tmp_path / "results")))


def test_the_commands_of_runs(tmp_path):
    work, seed = work_in(tmp_path), f"{tmp_path}/parts/full/seed-1"
    of = {rival.row: " ".join(map(str, rivals.part_of_rival(work, 1, rival)))
          for rival in rivals.rivals_of(work)}
    assert of[rivals.PRFL] == (
        f"{seed}/rivals-PRFL_steady-recipe_480_seed-1 transformer/config.json train_align.py --method prfl "
        f"--seed 1 --curated_dir {seed}/curated --reward {seed}/reward-mismatched-0.25/reward "
        f"--max_train_steps 480 --validation_steps 40 --num_validation 256")
    assert "--method nft" in of["DiffusionNFT"] and "--method grpo" in of["Flow-GRPO"]
    assert "--reward" not in of["SFT"].split()
    assert "-m study.why --variant leaps" in of["LeapAlign"]
    assert "config.json -m study.why --variant direct_align --rollout_passes 4" in of["Direct-Align"]
    quick = rivals.rivals_of(work_in(tmp_path, "quick"))
    assert [rival.length for rival in quick] == [rival.length // 2 for rival in rivals.FULL]
    for prfl in (quick[0], rivals.FULL[0]):                     # looked at after a quarter of its run
        assert prfl.length // 4 % prfl.every == 0


def run_of(rates, seconds, good, length):
    """What is kept of a run with validations at these rates and CPU seconds."""
    steps = np.linspace(0, length, len(rates)).round().astype(int)
    curve = {str(step): {"qualified": rate, "cpu_seconds": spent, "reward": 2.0}
             for step, rate, spent in zip(steps, rates, seconds)}
    bits = "1" * good + "0" * (endurance.TESTED - good)
    verdicts = dict.fromkeys(("qualified", "physical", "deformity", "adherent"), bits)
    return {"command": "x", "commit": "y", "minutes": 1.0, "curve": curve,
            "test": {"test, firm": verdicts, "test means": [0.05, 0.2, 0.1]}}


def test_passes_by_hand():
    assert rivals.passes(("--method", "sft")) == (1, 1)
    # N = 4, every step: 0, 1, 2 or 3 before the one with gradients, then PAVRM; an SFT update beside
    assert rivals.passes(("--method", "prfl", "--rollout_passes", 0), N=4) == (1 + 1.5 + 2, 3)
    # to all four steps, then the step with gradients and PAVRM
    assert rivals.passes(("--variant", "direct_align", "--rollout_passes", 2), N=4) == (1 + 2 + 2, 3)
    # leaps from 0 and 1, of 2 steps: three short rollouts of 0, 1 and 1 passes
    assert rivals.passes(("--variant", "leaps", "--rollout_passes", 4), N=2) == (1 + 2 + 3, 4)
    flags = ("--method", "nft", "--inner_updates", 3, "--no-sft_updates")
    assert rivals.passes(flags, N=4) == (4 + 1 + 6, 3) and rivals.passes(flags, N=16) == (8 + 1 + 6, 3)
    # 2 stochastic steps of N = 3: 0 or 1 before them for each of two groups of 2 in a batch, 1 or 0 after
    flags = ("--method", "grpo", "--group_size", 2, "--inner_updates", 2, "--no-sft_updates")
    assert rivals.passes(flags, N=3) == ((2 + 1 + 0.5 + 2) / 2 + 1 + 2 + 2, 2)
    assert rivals.passes((*flags, "--kl_weight", 0, "--rollout_passes", 1), N=3)[0] == (
        (0 + 2 + 1) + (0.5 + 2 + 0)) / 2 + 1 + 2


def test_a_rival_gets_at_least_prfls_seconds():
    part = run_of([0.3, 0.5, 0.6, 0.55], [0.0, 40.0, 80.0, 120.0], 0, 30)
    assert [rivals.rate_at(part, seconds) for seconds in (0, 30, 40, 41, 500)] == [0.3, 0.5, 0.5, 0.6, 0.55]


def test_a_comparison_by_hand():
    found = rivals.comparison("a above b", [0.75, 0.5], [0.25, 0.5])
    ones = lambda rate: np.arange(endurance.VALIDATED) < rate * endurance.VALIDATED
    wanted = confidence_interval(np.stack([ones(0.75), ones(0.5)]), np.stack([ones(0.25), ones(0.5)]))
    assert found["interval"] == wanted and found["seeds"] == [0.5, 0.0]
    assert found["difference"] == 0.25 and found["verdict"] == "cannot be told"
    assert rivals.comparison("a above b", [0.9, 0.9], [0.3, 0.3])["verdict"] == "holds"


def test_what_was_tried_by_hand():
    point = lambda seconds, bits: {"cpu_seconds": seconds, "qualified": bits}
    trials = [{"flags": "--method prfl", "validations": {"0": point(0, "0001"), "4": point(10, "1111")}},
              {"flags": "--method nft", "validations": {"0": point(0, "0001"), "2": point(9, "0111"),
                                                        "4": point(18, "0011"), "6": point(27, "0001")}}]
    numbers, rows = rivals.trial_rows(trials)
    assert numbers[1]["rates"] == {"2": 0.75, "4": 0.5, "6": 0.25} and numbers[1]["best"]["mean"] == 0.75
    assert numbers[1]["prfl_above"]["mean"] == 0.5 and numbers[0]["prfl_above"] is None
    assert rows[1][1] == "0.750 (2, 9 s), 0.500 (4, 18 s), 0.250 (6, 27 s)" and rows[0][-1] == ""


def test_iterations_are_timed_in_turn(tmp_path, monkeypatch):
    """The second iterations of the first turn, then those of the next; what is kept is not measured again."""
    work, made = work_in(tmp_path), []
    monkeypatch.setattr(endurance, "HOME", tmp_path)

    def run(self, wanted, jobs=None):
        (folder, _, *command), = wanted
        made.append((folder.name, " ".join(map(str, command)), jobs))
        folder.mkdir(parents=True)
        each = 2.0 if "nft" in command else 1.0
        (folder / "metrics.jsonl").write_text("".join(
            json.dumps({"step": step, "sft_cpu_seconds": each / 2, "nft_cpu_seconds": each / 2,
                        "sft_seconds": 99} | ({"sft_cpu_seconds": 50} if step < 3 else {})) + "\n"
            for step in range(1, rivals.TIMED + 1)))
    monkeypatch.setattr(parts.Work, "run", run)
    seconds = rivals.seconds_per_iteration(work)
    assert seconds["DiffusionNFT"] == 2 and seconds[rivals.PRFL] == seconds["LeapAlign"] == 1
    assert len(made) == rivals.TURNS * len(rivals.FULL) and {jobs for *_, jobs in made} == {1}
    assert [name for name, *_ in made][:2] == ["rivals-seconds-PRFL_steady-recipe-0",
                                               "rivals-seconds-DiffusionNFT-0"]
    for _, words, _ in made:
        assert "--num_validation 0" in words and "--validation_steps" not in words
        assert f"--max_train_steps {rivals.TIMED}" in words
    assert rivals.seconds_per_iteration(work) == seconds and len(made) == rivals.TURNS * len(rivals.FULL)


def test_what_is_kept_makes_the_table(tmp_path, monkeypatch):
    """Two seeds of three, and a method whose second seed is missing."""
    work = work_in(tmp_path)
    prfl, nft, _, grpo, *_ = rivals.rivals_of(work)
    kept = {}
    for seed in (0, 1):
        kept[prfl.name(seed)] = run_of([0.3, 0.9, 0.95, 0.95, 0.96], [0.0, 50, 100, 150, 200], 480,
                                       prfl.length)
        kept[nft.name(seed)] = run_of([0.3, 0.5, 0.65, 0.75, 0.7], [0.0, 60, 110, 160, 210], 360, nft.length)
    kept[grpo.name(0)] = run_of([0.3, 0.4, 0.5, 0.55, 0.5], [0.0, 40, 80, 120, 160], 250, grpo.length)
    monkeypatch.setattr(rivals, "plot", lambda path, panels: None)
    seconds = {prfl.row: 200 / prfl.length, nft.row: 1.3, grpo.row: 2 / 3}      # not those of the runs
    rivals.report(work, kept, seconds)
    found, text = (work.results / "rivals.json").read_text(), (work.results / "rivals.md").read_text()
    found = json.loads(found)
    nft_passes = "{:.1f} + {}".format(*rivals.passes(nft.flags))
    assert found["rows"]["DiffusionNFT"]["qualified"]["mean"] == pytest.approx(360 / 512)
    assert found["rows"]["DiffusionNFT"]["seconds"]["0.7"] == pytest.approx([156, 156])
    assert found["rows"]["Flow-GRPO"]["seconds"]["0.6"] == [None] and "SFT" not in found["rows"]
    claims = {claim["claim"]: claim for claim in found["claims"]}
    at = claims["after the CPU seconds of 120 iterations of PRFL, PRFL above DiffusionNFT"]
    assert at["difference"] == pytest.approx(0.9 - 0.5) and at["verdict"] == "holds"
    at = claims["after the CPU seconds of 480 iterations of PRFL, PRFL above Flow-GRPO"]
    assert at["seeds"] == pytest.approx([0.96 - 0.5])           # it ended earlier: its last validation
    assert claims["Flow-GRPO at its best validation above the base"]["difference"] == pytest.approx(0.25)
    assert f"| DiffusionNFT | 2 | {nft_passes} | 104 | 156 | never | never | 0.750 | 0.700 | 208 |" in text
    assert "5 of 21 runs are made." in text
