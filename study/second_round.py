"""`python -m study.reproduce second_round`: what are labels of the aligned generator's samples worth?

The first round of labels is given to samples of the base. A reward model learns from them, and the base is
aligned with it. Then the same number of labels is added in one of two ways: to more samples of the base, or
to samples of the generator that was just aligned. For each way another reward model trains on both rounds
(train_reward.py --data A B), and the base is aligned anew. Finished rows of the table are kept in
results/second_round_runs.json and are not made again.
"""
import numpy as np

from formats.metadata import from_json
from report import claim_verdicts, claims_table, show, summary, table
from study.endurance import EVERY, RECIPES, VALIDATED, curve_of, keep, kept_in, test_verdicts
from study.parts import commit, read_metrics

FILE = "second_round_runs.json"
SAMPLES, REWARD_STEPS, LENGTH, RATE = 1024, 800, 480, 2e-4
FIRST, MORE, ALIGNED = "first round", "and as many of the base", "and as many of the aligned generator"
ROWS = (FIRST, MORE, ALIGNED)
HEAD = ["labels", "seeds", "labelled", "held-out accuracy, clean", "40", "120", "240", "480", "test videos",
        "by seed", "adherent"]


def parts_of(work, seed, row):
    """The three parts of a row, as Work.run takes them: its samples, its reward model and its alignment."""
    home = work.folder / f"seed-{seed}"
    folder = lambda kind, row: home / f"second_round-{kind}-{ROWS.index(row)}"
    transformer = ("--transformer", folder("aligned", FIRST) / "transformer") if row == ALIGNED else ()
    samples = (folder("samples", row), "shards/shards.json", "-m", "study.samples", *transformer,
               "--count", SAMPLES, "--seed", 100 + 2 * seed + (row != FIRST))
    data = dict.fromkeys(folder("samples", of) / "shards" for of in (FIRST, row))
    reward = (folder("reward", row), "report.json", "train_reward.py", "--data", *data, "--seed", seed,
              "--max_train_steps", REWARD_STEPS)
    align = (folder("aligned", row), "transformer/config.json", *RECIPES["steady"], "--seed", seed,
             "--curated_dir", home / "curated", "--reward", folder("reward", row) / "reward",
             "--learning_rate", RATE, "--lr_scheduler", "linear", "--max_train_steps", LENGTH,
             "--validation_steps", EVERY, "--num_validation", VALIDATED, "--checkpointing_steps", 120)
    return samples, reward, align


def finished(work, wanted):
    """Makes the rows [(seed, row)] that are not kept -> {(seed, row): what is kept of the row}"""
    kept = kept_in(work, FILE)
    for seed, row in wanted:
        name = f"{row}, seed {seed}"
        if name in kept:
            continue
        rows = [row] if row == FIRST else [FIRST, row]          # the second round uses the first one's parts
        for part in [part for row in rows for part in parts_of(work, seed, row)]:
            work.run([part])
        (_, (reward, *_), (align, *_)) = parts_of(work, seed, row)
        kept[name] = {"commit": commit(), "reward": from_json((reward / "report.json").read_text()),
                      "curve": curve_of(read_metrics(align)), "test": test_verdicts(align / "transformer")}
        keep(work, FILE, kept)
    return {(seed, row): kept[f"{row}, seed {seed}"] for seed, row in wanted}


def second_round(work):
    report(work, finished(work, [(seed, row) for seed in work.seeds for row in ROWS]))


def report(work, kept):
    """Writes the table. kept: what `finished` returned."""
    rows, cells, qualified = {}, [], {}
    for row in ROWS:
        parts = [kept[seed, row] for seed in work.seeds if (seed, row) in kept]
        if not parts:
            continue
        rewards = [part["reward"] for part in parts]
        videos = lambda what: np.array([[float(bit) for bit in part["test"]["test, firm"][what]]
                                        for part in parts])
        qualified[row] = videos("qualified")
        test = summary(qualified[row])
        at = {step: [part["curve"][str(step)]["qualified"] for part in parts] for step in (40, 120, 240, 480)}
        labelled = np.mean([reward["trained_on"] + reward["held_out"] for reward in rewards])
        accuracy = np.mean([reward["clean"]["accuracy"] for reward in rewards])
        rows[row] = {"validation": at, "qualified": test, "labelled": labelled, "reward_accuracy": accuracy}
        cells.append([row, len(parts), f"{labelled:.0f}", f"{accuracy:.3f}",
                      *(f"{np.mean(values):.3f}" for values in at.values()), show(**test),
                      " ".join(f"{value:.3f}" for value in test["seeds"]),
                      f"{videos('adherent').mean():.3f}"])
    pairs = [(ALIGNED, MORE, "not in it"), (ALIGNED, FIRST, "not in it"), (MORE, FIRST, "not in it")]
    claims = claim_verdicts([pair for pair in pairs if {*pair[:2]} <= set(qualified)], qualified)
    work.write("second_round", "What are labels of the aligned generator's samples worth?", [
        f"The first round is {SAMPLES} samples of the base; a second round adds {SAMPLES} samples. Samples "
        f"whose grade lies between good and bad have no label. All reward models train for {REWARD_STEPS} "
        f"steps. The base is then aligned for {LENGTH} iterations of the steady recipe, whose learning rate "
        f"falls from 2e-4 to 0. The columns 40 to {LENGTH} are the share of {VALIDATED} validation videos "
        "that are qualified after this many iterations. The columns after them are about the test videos at "
        "the end.", "",
        *table(HEAD, cells), *claims_table(claims)], {"rows": rows, "claims": claims})
