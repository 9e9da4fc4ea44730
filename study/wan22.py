"""`python -m study.reproduce wan22`: how well PRFL trains generators that are built in Wan2.2's two ways.
They are made in the embedded world, where results can be measured.

two experts     A14B's way. The base is tuned twice, each time only on one side of a boundary: the high-noise
                expert for t >= boundary, the low-noise expert below. PRFL then trains the low-noise expert,
                the high-noise one, or both, and for comparison the base itself, for as many iterations.
                When only the low-noise expert trains, rollouts begin with long steps of the high-noise
                expert, which is frozen and never learned long steps. So one more run makes every step of its
                rollouts.
pinned frame    TI2V-5B's way to image-to-video. The text-to-video base is tuned to take the first latent
                frame clean, in its place and at time 0. Then a reward model is trained, and SFT and PRFL run.

PRFL is the steady recipe at its default rate. All alignments of two experts and of the base train against the
shipped reward model. What a seed gave for one of these two sections is kept in results/wan22_runs.json and is
not made again.
"""
import numpy as np

from formats import runs
from formats.metadata import from_json
from formats.weights import SHIPPED
from report import claim_verdicts, claims_table, show, summary, table
from study.endurance import bits, keep, kept_in
from study.parts import METRICS, commit

FILE = "wan22_runs.json"
BASE = SHIPPED["t2v"]
BOUNDARY = 0.5              # of 16 even steps the low-noise expert makes 7; A14B's makes 14 of 40 by default
ITERATIONS, TESTED, SAMPLES, REWARD_STEPS = 80, 512, 2048, 300
TUNE = ("-m", "world.pretrain", "dit", "--init", BASE / "transformer", "--warmup_steps", 20, "--ema", 0.99,
        "--muon_learning_rate", 0.005, "--adam_learning_rate", 3e-4, "--timestep_shift", 1,
        "--validation_steps", 100)
BATCH, EXPERT_UPDATES, PINNED_UPDATES = 64, 100, 300            # for the tuning of the base
GRADES = ("qualified", "physical_qualified", "deformity_qualified", "adherent")
ONE, START = "the base, PRFL", "two experts"
LOW, HIGH, BOTH = (f"{START}, PRFL on {name}" for name in ("the low-noise one", "the high-noise one", "both"))
EVERY_STEP = f"{LOW}, every step of its rollouts"               # in place of at most four long ones


# ---- the parts of one seed
def tuning(updates):
    """Flags of world/pretrain.py for this many updates. The learning rate rises until the 20th update and
    falls after it."""
    return (*TUNE, "--clips", 4096, "--batch_size", BATCH, "--max_train_steps", updates, "--decay_steps",
            updates - 20)


def generator(folder, index=None, **parts):
    """Makes `folder` a generator's folder -> folder. It gets links to the shipped encoders and to parts
    {subfolder's name: folder}. index: what its model_index.json holds."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, target in ({name: BASE / name for name in ("vae", "text_encoder")} | parts).items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target.resolve())
    if index:
        runs.write_json(folder / "model_index.json", index)
    return folder


def made(work, seed, name, last, *command):
    """Runs a part unless it is finished -> its folder."""
    folder = work.folder / f"seed-{seed}" / f"wan22-{name}"
    work.run([(folder, last, *command, "--seed", seed)])
    return folder


def pair(work, seed):
    """Tunes the base to two experts -> the folder of a generator that has both."""
    high, low = (made(work, seed, name, "transformer/config.json", *tuning(EXPERT_UPDATES), "--expert", name,
                      "--boundary", BOUNDARY) / "transformer" for name in ("high", "low"))
    index = {"_class_name": "WanPipeline", "boundary_ratio": BOUNDARY}
    return generator(high.parents[1] / "wan22-experts", index, transformer=high, transformer_2=low)


def aligned(work, seed, name, reward=BASE / "reward", method="prfl", updates=1, expert=None, **flags):
    """Aligns a generator -> the run folder. flags: further flags of train_align.py."""
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    if method != "sft":
        words += ["--reward", reward]
    if expert:
        words += ["--expert", expert]
    last = "transformer_2/config.json" if expert in ("low", "both") else "transformer/config.json"
    return made(work, seed, name, last, "train_align.py", "--method", method, "--num_validation", 0,
                "--max_train_steps", updates * ITERATIONS, "--curated_dir",
                work.folder / f"seed-{seed}" / "curated", *words)


def evaluated(work, seed, name, rows):
    """Evaluates rows {row: generator's folder} on the test videos -> {row: {grade: verdicts as `bits`,
    "speed": mean}}"""
    named = {f"g{i}": row for i, row in enumerate(rows)}
    folder = work.folder / f"seed-{seed}" / f"wan22-evaluation-{name}"
    work.run([(folder, "per_video.json", "evaluate.py",
               *(f"{short}={rows[row]}" for short, row in named.items()), "--num_videos", TESTED)])
    found = from_json((folder / "per_video.json").read_text())
    return {row: {grade: bits(found[short][grade]) for grade in GRADES}
            | {"speed": round(float(np.mean(found[short]["speed"])), 5)} for short, row in named.items()}


def two_experts(work, seed):
    start = pair(work, seed)
    rows = {"base": BASE, ONE: aligned(work, seed, "one"), START: start}
    for row, expert in ((LOW, "low"), (HIGH, "high"), (BOTH, "both")):
        rows[row] = aligned(work, seed, f"prfl-{expert}", expert=expert, model=start)
    rows[EVERY_STEP] = aligned(work, seed, "prfl-low-every-step", expert="low", model=start, rollout_passes=0)
    return evaluated(work, seed, "experts", rows)


def pinned(work, seed):
    tuned = made(work, seed, "pinned", "transformer/config.json", *tuning(PINNED_UPDATES), "--preset",
                 "tiny-i2v-pinned")
    model = generator(tuned.parent / "wan22-pinned-base", transformer=tuned / "transformer")
    reward = made(work, seed, "pinned-reward", "report.json", "train_reward.py", "--model", model,
                  "--num_samples", SAMPLES, "--max_train_steps", REWARD_STEPS)
    rows = {"base": model,
            "SFT": aligned(work, seed, "pinned-sft", method="sft", updates=2, model=model,
                           learning_rate=3e-4),
            "PRFL": aligned(work, seed, "pinned-prfl", reward / "reward", model=model)}
    return evaluated(work, seed, "pinned", rows)


SECTIONS = {"two experts": two_experts, "pinned frame": pinned}


# ---- the study
def finished(work):
    """Makes the sections that are not kept -> {(seed, section): what the section's function returned}"""
    kept = kept_in(work, FILE)
    for section, make in SECTIONS.items():
        for seed in work.seeds:
            if f"{section}, seed {seed}" not in kept:
                kept[f"{section}, seed {seed}"] = {"commit": commit(), "rows": make(work, seed)}
                keep(work, FILE, kept)
    return {(seed, section): kept[f"{section}, seed {seed}"]["rows"] for section in SECTIONS
            for seed in work.seeds}


def wan22(work):
    report(work, finished(work))


def values_of(parts, row, what):
    """parts: a section's rows, one dict for each seed -> one row's verdicts `what`, [seeds, videos]"""
    return np.array([[float(bit) for bit in part[row][what]] for part in parts])


def of_generators(parts, claims):
    """parts: a section's rows, one dict for each seed -> ({row: numbers}, claims with verdicts, lines of the
    two tables)"""
    rows, cells, qualified = {}, [], {}
    for row in parts[0]:
        qualified[row] = values_of(parts, row, "qualified")
        means = {grade: float(values_of(parts, row, grade).mean()) for grade in GRADES[1:]}
        means["speed"] = float(np.mean([part[row]["speed"] for part in parts]))
        rows[row] = {"qualified": summary(qualified[row])} | {name: {"mean": mean}
                                                              for name, mean in means.items()}
        cells.append([row, show(**rows[row]["qualified"]), *(f"{mean:.3f}" for mean in means.values())])
    if LOW in qualified:                # one claim: alone, the low-noise expert brings half of what both do
        qualified["gain of the low-noise one alone"] = qualified[LOW] - qualified[START]
        qualified["half of the gain of both"] = (qualified[BOTH] - qualified[START]) / 2
    claims = claim_verdicts([(*claim, "not in it") for claim in claims], qualified)
    head = ["", *(METRICS[grade] for grade in GRADES), "speed"]
    return rows, claims, [*table(head, cells), *claims_table(claims)]


CLAIMS = {"two experts": [(LOW, START), (BOTH, LOW), (HIGH, LOW), (BOTH, HIGH), (EVERY_STEP, LOW),
                          (HIGH, EVERY_STEP), (BOTH, ONE),
                          ("gain of the low-noise one alone", "half of the gain of both")],
          "pinned frame": [("PRFL", "base"), ("PRFL", "SFT"), ("SFT", "base")]}
ABOUT = {"two experts": f"The boundary is {BOUNDARY}: the high-noise expert makes 9 of the 16 steps of a "
                        f"rollout, the low-noise one 7. Each expert is the base, tuned on its side of the "
                        f"boundary for {EXPERT_UPDATES} updates of {BATCH} clips each, from the mixture that "
                        "the base was trained on.",
         "pinned frame": "Image-to-video. The given first frames come from clean renders. The base here is "
                         f"the text-to-video base, tuned for {PINNED_UPDATES} updates of {BATCH} clips each."}


def report(work, kept):
    """Writes the tables. kept: what `finished` returned, or less of it."""
    values, lines = {}, []
    for section, claims in CLAIMS.items():
        parts = [kept[seed, section] for seed in work.seeds if (seed, section) in kept]
        if parts:
            rows, verdicts, said = of_generators(parts, claims)
            values[section] = {"rows": rows, "claims": verdicts}
            lines += [f"## {section.capitalize()}", "", ABOUT[section], "", *said]
    if len(kept) < len(SECTIONS) * len(work.seeds):
        lines += ["Not all sections are made. The command below makes the others.", ""]
    work.write("wan22", "Wan2.2's two experts and its pinned frame, in the embedded world", [
        f"{TESTED} test videos, the same noise in every row ({work.said_seeds()}). PRFL is the steady recipe "
        f"for {ITERATIONS} iterations; SFT makes the same number of updates.", "", *lines], values)
