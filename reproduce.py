"""The paper's comparisons on the embedded world, a command each. Finished parts are kept; run again to go on.

    python reproduce.py table1                    three seeds, learning-rate sweep, 512 videos
    python reproduce.py table1 --preset quick     one seed, no sweep, 256 videos
    python reproduce.py annotator                 the judge itself after mp4 and VAE: clean clips that pass, flaws that fail

table1: the base, SFT and RWR at PRFL's number of optimizer updates, SFT at PRFL's wall time, and PRFL. Every method
gets the same three learning rates; the best one of seed 0, on other draws of held-out prompts and noise than those
reported, is kept for all seeds. The paper's other tables, and RGB ReFL, are not here yet. Each part is a plain call of
this repository's own scripts, printed as it is run.
Writes results/<name>.md and .json.
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import InputError, arg

HERE = Path(__file__).resolve().parent
RATES = (1e-5, 3e-5, 1e-4)
PRESETS = {
    "quick": {"seeds": 1, "rates": (3e-5,), "videos": 256, "samples": 3072, "reward_steps": 400, "clips": 400},
    "full": {"seeds": 3, "rates": RATES, "videos": 512, "samples": 4096, "reward_steps": 600, "clips": 2000},
}
ITERATIONS = 80                                                  # of PRFL: 160 optimizer updates


@dataclass
class Config:
    name: str = arg(..., "what to reproduce", choices=("table1", "annotator"), positional=True)
    preset: str = arg("full", "full is what results/ holds", choices=tuple(PRESETS))
    seeds: int | None = arg(None, "seeds; without, the preset's", above=0)
    output_dir: str = arg("runs/reproduce", "where the parts are kept")
    results_dir: str = arg("results", "where the tables go")


def run(*command):
    """One of our own scripts, printed as a reader would type it."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    done = subprocess.run([sys.executable, str(HERE / command[0]), *map(str, command[1:])])
    if done.returncode:
        raise InputError(f"`python {' '.join(map(str, command))}` ended with code {done.returncode}")


def provenance(config, started):
    """What a results file says of its making."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout
    minutes = (time.time() - started) / 60
    return {"command": f"python reproduce.py {config.name} --preset {config.preset}", "commit": commit.strip(),
            "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})", "minutes": round(minutes, 1)}


def write_results(config, text, values):
    folder = Path(config.results_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = values["provenance"]
    (folder / f"{config.name}.md").write_text(
        text + f"\n`{about['command']}` at {about['commit']}, {about['hardware']}, {about['minutes']} minutes "
        "(of this last call; finished parts are reused).\n")
    common.write_json(folder / f"{config.name}.json", values)
    print(text + f"\nwrote {folder / config.name}.md and .json")


# ---- table 1
def align(folder, method, rate, steps, seed, shards, reward=None):
    """One alignment run, unless it is finished; returns its folder."""
    if not (folder / "transformer" / "config.json").exists():
        resume = ["--resume", "latest"] if common.checkpoints(folder) else []
        run("train_align.py", "--method", method, "--learning_rate", rate, "--max_train_steps", steps, "--seed", seed,
            "--data", shards, *(["--reward", reward] if reward else []), "--output_dir", folder, *resume)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of_equal_time(prfl, sft):
    """SFT updates that take as long as PRFL's iterations, by the median seconds of each (the reward model's own
    training is not counted)."""
    iteration = np.median([row["sft_seconds"] + row["reward_seconds"] for row in rows_of(prfl) if "reward" in row])
    update = np.median([row["sft_seconds"] for row in rows_of(sft) if "sft_seconds" in row])
    return round(ITERATIONS * iteration / update)


def evaluate(folder, named, seed, videos, reward):
    """Per-video values of each named checkpoint; kept."""
    if not (folder / "per_video.json").exists():
        run("evaluate.py", *[f"{name}={path}" for name, path in named.items()], "--seed", seed, "--num_videos", videos,
            "--reward", reward, "--output_dir", folder)
    return json.loads((folder / "per_video.json").read_text())


def seeds_and_videos_interval(values, rounds=2000):
    """95 % interval of the mean of values [seeds][videos]: seeds and videos are resampled, each with replacement."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    s, m = values.shape
    means = [values[rng.integers(0, s, s)][:, rng.integers(0, m, m)].mean() for _ in range(rounds)]
    return [float(x) for x in np.quantile(means, (0.025, 0.975))]


def table1(config, preset, started):
    work, seeds = Path(config.output_dir) / f"table1-{config.preset}", range(config.seeds or preset["seeds"])
    clips, shards = work / "curated" / "clips", work / "curated" / "latents"
    if not (clips / "metadata.jsonl").exists():
        run("data.py", "world", clips, "--count", 1024, "--seed", 500, "--kind", "clean")
    run("data.py", "encode", clips, "--out", shards)             # goes on where it stopped; quick when complete
    rewards = {seed: work / f"seed-{seed}" / "reward" for seed in seeds}
    for seed, folder in rewards.items():
        if not (folder / "report.json").exists():
            resume = ["--resume", "latest"] if common.checkpoints(folder) else []
            run("train_reward.py", "--seed", seed, "--num_samples", preset["samples"], "--max_train_steps",
                preset["reward_steps"], "--output_dir", folder, *resume)

    def equal_time_steps():
        """Decided once, from the runs of seed 0 at the last rate."""
        path, rate = work / "equal-time.json", preset["rates"][-1]
        if not path.exists():
            common.write_json(path, {"sft_steps": steps_of_equal_time(aligned("PRFL", 0, rate), aligned("SFT", 0, rate))})
        return json.loads(path.read_text())["sft_steps"]

    def aligned(method, seed, rate):
        """The folder of one alignment run."""
        base, reward = work / f"seed-{seed}", rewards[seed] / "reward"
        if method == "PRFL":
            return align(base / f"prfl-{rate:g}", "prfl", rate, ITERATIONS, seed, shards, reward)
        if method == "RWR":
            return align(base / f"rwr-{rate:g}", "rwr", rate, 2 * ITERATIONS, seed, shards, reward)
        if method == "SFT":
            return align(base / f"sft-{rate:g}", "sft", rate, 2 * ITERATIONS, seed, shards)
        return align(base / f"sft-long-{rate:g}", "sft", rate, equal_time_steps(), seed, shards)

    methods, sweep, best = ("RWR", "SFT", "SFT, equal time", "PRFL"), {}, {}
    for rate in preset["rates"]:
        found = evaluate(work / f"sweep-{rate:g}", {method: aligned(method, 0, rate) for method in methods}, 50, 256,
                         rewards[0] / "reward")                  # other draws and noise than the reported ones
        for method in methods:
            sweep.setdefault(method, {})[rate] = float(np.mean(found[method]["qualified"]))
    for method, rates in sweep.items():
        best[method] = max(rates, key=rates.get)

    per_seed = []
    for seed in seeds:
        named = {"base": HERE / "checkpoints"} | {method: aligned(method, seed, rate) for method, rate in best.items()}
        per_seed.append(evaluate(work / f"seed-{seed}" / "evaluation", named, 0, preset["videos"],
                                 rewards[seed] / "reward"))
    order = ["base", "RWR", "SFT", "SFT, equal time", "PRFL", "clean renders"]
    columns = {"qualified": "qualified", "physical_qualified": "physical", "deformity_qualified": "deformity",
               "adherent": "adherent", "smoothness": "smoothness", "dynamic": "dynamic", "consistency": "consistency",
               "speed": "speed", "brightness": "brightness", "saturation": "saturation"}
    rows = {}
    for name in order:
        rows[name] = {c: {"mean": float(np.mean([found[name][c] for found in per_seed])),
                          "interval": seeds_and_videos_interval([found[name][c] for found in per_seed]),
                          "seeds": [float(np.mean(found[name][c])) for found in per_seed]} for c in columns}
    against = {}
    for name in order[:4]:
        gaps = [np.subtract(found["PRFL"]["qualified"], found[name]["qualified"]) for found in per_seed]
        grades = [np.subtract(found["PRFL"]["grade"], found[name]["grade"]) for found in per_seed]
        low, high = seeds_and_videos_interval(gaps)
        against[name] = {"difference": float(np.mean(gaps)), "interval": [low, high],
                         "win": float(np.mean(np.array(grades) > 0)), "tie": float(np.mean(np.array(grades) == 0)),
                         "lose": float(np.mean(np.array(grades) < 0)),
                         "verdict": "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told"}
    reports = [json.loads((folder / "report.json").read_text()) for folder in rewards.values()]
    lines = [f"# Table 1: PRFL and its baselines ({len(list(seeds))} seeds, {preset['videos']} videos, same noise)", "",
             "Mean over seeds and videos, 95 % interval from resampling both.", "",
             "| | " + " | ".join(columns.values()) + " | qualified, by seed |", "|---" * (len(columns) + 2) + "|"]
    for name, row in rows.items():
        low, high = row["qualified"]["interval"]
        cells = [f"**{row['qualified']['mean']:.3f}** [{low:.3f}, {high:.3f}]"] + [f"{row[c]['mean']:.3f}" for c in
                                                                            list(columns)[1:]]
        lines.append(f"| {name} | " + " | ".join(cells) + " | " + " ".join(f"{v:.3f}" for v in
                                                                           row["qualified"]["seeds"]) + " |")
    lines += ["", "| PRFL against | difference in qualified rate | win / tie / lose | PRFL above it (paper: yes) |",
              "|---|---|---|---|"]
    for name, pair in against.items():
        lines.append(f"| {name} | {pair['difference']:+.3f} [{pair['interval'][0]:+.3f}, {pair['interval'][1]:+.3f}] | "
                     f"{pair['win']:.2f} / {pair['tie']:.2f} / {pair['lose']:.2f} | {pair['verdict']} |")
    lines += ["", "Learning rates tried, qualified rate of 256 validation prompts, seed 0 (kept: the best of each row):", "",
              "| | " + " | ".join(f"{rate:g}" for rate in preset["rates"]) + " |", "|---" * (len(preset["rates"]) + 1) + "|"]
    lines += [f"| {method} | " + " | ".join(f"{value:.3f}" for value in rates.values()) + " |"
              for method, rates in sweep.items()]
    steps = json.loads((work / "equal-time.json").read_text())["sft_steps"]
    lines += ["", f"PRFL: {ITERATIONS} iterations, {2 * ITERATIONS} updates. SFT and RWR: {2 * ITERATIONS} updates. SFT, "
              f"equal time: {steps} updates.", "", "Reward model on 400 held-out own samples, by t (mean over seeds):", "",
              "| | [0, .2] | (.2, .4] | (.4, .6] | (.6, .8] | (.8, 1] | average |", "|---|---|---|---|---|---|---|"]
    for metric in ("accuracy", "balanced_accuracy", "auc"):
        values = np.mean([report[metric] for report in reports], 0)
        lines.append(f"| {metric.replace('_', ' ')} | " + " | ".join(f"{v:.3f}" for v in (*values, values.mean())) + " |")
    write_results(config, "\n".join(lines) + "\n", {
        "provenance": provenance(config, started), "rows": rows, "prfl_against": against, "sweep":
        {method: {str(k): v for k, v in rates.items()} for method, rates in sweep.items()}, "best_rate": best,
        "reward_reports": reports, "sft_steps_of_equal_time": steps})


# ---- the annotator
def annotator(config, preset, started):
    import torch

    import data
    import world
    from vae import from_pixels, load_vae, to_pixels

    vae, count = load_vae(HERE / "checkpoints" / "vae"), preset["clips"]

    @torch.no_grad()
    def judge(kind, n, seed):
        """Clips as anybody's arrive: written as mp4, read back, through the VAE, then judged."""
        videos, prompts, _ = world.make(n, seed, kind)
        with tempfile.TemporaryDirectory() as folder:
            read = []
            for i, video in enumerate(videos):
                data.write_video(Path(folder) / f"{i}.mp4", video)
                read.append(data.read_video(Path(folder) / f"{i}.mp4"))
        decoded = [to_pixels(vae.decode(vae.encode(from_pixels(x)))) for x in torch.stack(read).split(128)]
        return torch.cat(decoded), prompts

    rate = lambda judged: judged["qualified"].float().mean().item()
    clean, prompts = judge("clean", count, 1)
    passed = rate(world.annotate(clean, prompts))
    failed = {}
    for i, flaw in enumerate(common.progress(world.PHYSICAL + world.DEFORMITY, "flaws")):
        # "flawed" severities: 0.6 to 1, drawn
        videos, asked = judge(flaw, count // 10, 100 + i)
        failed[flaw] = 1 - rate(world.annotate(videos, asked))
    for key, names in (("direction", list(world.DIRECTIONS)), ("color", list(world.COLORS)), ("shape", world.SHAPES)):
        wrong = []
        for prompt in prompts:
            asked = world.parse_prompt(prompt)
            asked[key] = names[(list(names).index(asked[key]) + 1) % len(names)]
            wrong.append(f"a {asked['color']} {asked['shape']} moving {world.PHRASES[asked['direction']][0]}")
        failed[f"wrong {key} in the prompt"] = 1 - rate(world.annotate(clean, wrong))
    overall = float(np.mean([failed[name] for name in world.PHYSICAL + world.DEFORMITY]))
    lines = [f"# The annotator: {count} clean and {count} clearly flawed clips, after mp4 and VAE", "",
             f"Clean clips that pass: **{passed:.4f}**. Flawed clips (severity .6 to 1) that fail: **{overall:.4f}**.", "",
             "| flaw | fails |", "|---|---|", *[f"| {name.replace('_', ' ')} | {value:.4f} |" for name, value in failed.items()]]
    write_results(config, "\n".join(lines) + "\n",
                  {"provenance": provenance(config, started), "clean_pass": passed, "flawed_fail": overall, "fails": failed})


def main(config):
    started = time.time()
    {"table1": table1, "annotator": annotator}[config.name](config, PRESETS[config.preset], started)


if __name__ == "__main__":
    common.cli(main, Config, __doc__)
