"""The parts that reproduce.py's tables are made of. A part is one call of one of the other scripts. It has
its own folder, named by its flags. A finished part is kept, and every table that needs it uses it."""
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import common
from common import InputError
from formats import runs
from formats.metadata import from_json

HOME = Path(__file__).resolve().parents[1]                      # the repository's folder
I2V, MID = ("--task", "i2v"), ("--world", "mid")                # flags of parts that use another base
# learning rates: the best of those that were tried in results/table1.md
TUNED = {"prfl": 1e-4, "sft": 3e-4, "rwr": 1e-4, "refl": 1e-4}
METRICS = {"qualified": "qualified", "physical_qualified": "physical", "deformity_qualified": "deformity",
           "adherent": "adherent", "smoothness": "smoothness", "dynamic": "dynamic",
           "consistency": "consistency", "i2v_subject": "I2V subject", "speed": "speed",
           "brightness": "brightness", "saturation": "saturation"}
PRESETS = {"quick": {"seeds": 1, "sweep": False, "videos": 256, "samples": 4096, "reward_steps": 600,
                     "study_steps": 200, "iterations": 80, "tested": 512, "rounds": 4, "clips": 400,
                     "candidates": 8},
           "full": {"seeds": 3, "sweep": True, "videos": 512, "samples": 16384, "reward_steps": 1600,
                    "study_steps": 800, "iterations": 120, "tested": 2048, "rounds": 16, "clips": 2000,
                    "candidates": 16},}


class Work:
    """Where the parts of a preset lie, and how they are run."""

    def __init__(self, config):
        self.config, self.preset = config, PRESETS[config.preset]
        self.folder = Path(config.output_dir) / config.preset
        self.results = Path(config.results_dir)
        self.seeds = range(config.seeds or self.preset["seeds"])
        # Small models gain little from a second thread. So on CPUs every part has one thread, and as many
        # parts run at a time as there are cores.
        on_gpu = torch.cuda.is_available()
        self.jobs = 1 if on_gpu else os.cpu_count()
        self.environment = os.environ | {"PYTHONPATH": str(HOME)} | (
            {} if on_gpu else {"OMP_NUM_THREADS": "1"})
        self.started, self.used, self.children = time.time(), set(), []

    def run(self, parts, jobs=None):
        """Runs those of parts [(folder, last file that it writes, script, *flags)] that are not finished,
        `jobs` at a time (None: self.jobs). Training continues from its last checkpoint. Raises InputError
        with the last line that a failing part printed, or if a folder holds another part."""
        unfinished = {}
        for folder, last, *command in parts:
            words = shlex.join(map(str, (*command, "--output_dir", folder)))
            check_part(folder, words, (folder / last).exists())
            self.used.add(folder)
            if not (folder / last).exists():
                unfinished[folder] = words
        bar = common.progress(len(unfinished), "parts")
        with ThreadPoolExecutor(jobs or self.jobs) as pool:
            running = [pool.submit(self._run, folder, words, bar) for folder, words in unfinished.items()]
            try:
                for part in running:
                    part.result()
            except BaseException:                                   # Ctrl-C and kill end the parts too
                pool.shutdown(wait=False, cancel_futures=True)
                for child in self.children:
                    child.terminate()
                raise
        bar.close()

    def _run(self, folder, words, bar):
        call = program(words) + (["--resume", "latest"] if runs.list_checkpoints(folder) else [])
        bar.write(f"$ python {words}")
        folder.mkdir(parents=True, exist_ok=True)
        start, before = time.time(), part_of(folder).get("seconds", 0)      # until it was last interrupted
        made = [*part_of(folder).get("commit", "").split(), commit()]       # several, if it was resumed
        note = {"command": f"python {words}", "commit": " ".join(dict.fromkeys(made)), "seconds": before}
        runs.write_json(folder / "part.json", note)
        with (folder / "log.txt").open("a") as log:
            child = subprocess.Popen(call, stdout=log, stderr=log, env=self.environment)
            self.children.append(child)
            code = child.wait()
        runs.write_json(folder / "part.json", note | {"seconds": before + time.time() - start})
        if code:
            said = (folder / "log.txt").read_text().strip().splitlines()[-1:]
            raise InputError(f"`python {words}` ended with code {code}: {' '.join(said)} (all it said: "
                             f"{folder}/log.txt)")
        bar.update()

    def said_seeds(self):
        count = len(self.seeds)
        return f"{count} seeds" if count > 1 else "1 seed: intervals are over videos alone"

    def write(self, name, title, lines, values):
        """Writes <name>.md and <name>.json to the results folder, with the command, the commits of this call
        and of the parts, the machine, and the minutes."""
        gpu = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
        seeds = f" --seeds {self.config.seeds}" if self.config.seeds else ""
        parts = [part_of(folder) for folder in self.used]
        about = {"command": f"python -m study.reproduce {name} --preset {self.config.preset}{seeds}",
                 "commit": COMMIT, "commits_of_parts": sorted({part["commit"] for part in parts}),
                 "hardware": device, "mixed_precision": runs.fast_precision(),
                 "minutes": round((time.time() - self.started) / 60, 1), "parts": len(parts),
                 "parts_without_time": sum(not part["seconds"] for part in parts),
                 "minutes_of_parts": round(sum(part["seconds"] for part in parts) / 60, 1)}
        precision = "bf16" if about["mixed_precision"] == "bf16" else "float32"
        said = (f"`{about['command']}` at {about['commit']}, {about['hardware']}, {precision}; this call "
                f"took {about['minutes']} minutes.")
        if parts:
            missing = f" (without {about['parts_without_time']} whose time was not kept)" * bool(
                about["parts_without_time"])
            said += (f" The table's {len(parts)} runs, evaluations and measurements "
                     f"({'' if gpu else 'of one thread each; '}shared with other tables) took "
                     f"{about['minutes_of_parts']} minutes in sum{missing}, at "
                     f"{', '.join(about['commits_of_parts'])}.")
        self.results.mkdir(parents=True, exist_ok=True)
        text = "\n".join([f"# {title}", "", *lines, said, ""])
        (self.results / f"{name}.md").write_text(text)
        runs.write_json(self.results / f"{name}.json", {"provenance": about, **values})
        print(text + f"\nwrote {self.results / name}.md and .json")


def program(words):
    """`train_align.py --seed 0` or `-m study.cost cell` -> the command as a list, which can be started in any
    folder."""
    first, *rest = shlex.split(words)
    return [sys.executable, first if first == "-m" else str(HOME / first), *rest]


def part_of(folder):
    """What ran in folder: {"command", "commit", "seconds"}; {} before the first time."""
    path = folder / "part.json"
    try:
        return dict(from_json(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove its folder") from None


def read_metrics(folder):
    """The rows of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_part(folder, words, finished):
    """Raises InputError if a folder holds another part. Its name alone cannot tell, because a name has
    neither the scripts' defaults nor the numbers of a preset."""
    kept = part_of(folder).get("command", "an unknown command" if finished else None)
    if kept not in (None, f"python {words}"):
        raise InputError(f"{folder} was made by `{kept}`, not by `python {words}`: remove it, or take "
                         f"another --output_dir")


def commit():
    """The commit of this code, with -dirty if code or weights differ from it."""
    git = lambda *words: subprocess.run(["git", *words], cwd=HOME, capture_output=True,
                                        text=True).stdout.strip()
    changed = git("status", "--porcelain", "--", "*.py", "checkpoints")
    return (git("rev-parse", "--short", "HEAD") or "no commit") + "-dirty" * bool(changed)


COMMIT = commit()               # read at the start, because files may change while the parts run


def named(prefix, flags):
    """A folder name that says what was run, so that two tables that need the same part share it."""
    return "-".join([prefix, *(str(flag).removeprefix("--").replace("/", "_") for flag in flags)])


def base_of(flags):
    """Those of the flags that say which shipped base is used."""
    return I2V if "i2v" in flags else MID if "mid" in flags else ()


def frames_of(flags):
    return flags[flags.index("--frames_decoded") + 1]


def reward_flags(method, flags):
    """The train_reward flags of the reward model that train_align uses with these flags."""
    pixels = ("--space", "rgb", "--frames_decoded", frames_of(flags)) if method == "refl" else ()
    return (*pixels, *base_of(flags))


def reward_folder(work, seed, flags=()):
    return work.folder / f"seed-{seed}" / named("reward", flags)


def train_rewards(work, variants):
    """Trains a reward model for each seed and each of the variants, which are train_reward flags."""
    train_reward_models(work, [(seed, flags) for seed in work.seeds for flags in variants])


def train_reward_models(work, wanted):
    """Trains the reward models [(seed, train_reward flags)]. Those of the same seed and base share their
    samples, unless the flags have --num_samples.

    As in the paper, reward models see no mismatched prompts, unless the flags have --mismatched.
    """
    def part(seed, flags):
        count = () if "--num_samples" in flags else (
            "--num_samples", work.preset["samples"],
            "--samples_dir", work.folder / f"seed-{seed}" / named("samples", base_of(flags)))
        return (reward_folder(work, seed, flags), "report.json", "train_reward.py", "--seed", seed, *count,
                *(() if "--max_train_steps" in flags else
                  ("--max_train_steps", work.preset["reward_steps"])),
                *(() if "--mismatched" in flags else ("--mismatched", 0)), *flags)

    first = {(seed, base_of(flags)): (seed, flags) for seed, flags in reversed(wanted)
             if "--num_samples" not in flags}
    work.run([part(*each) for each in first.values()])      # these make the samples that the others share
    work.run([part(*each) for each in wanted])


def curated(work):
    """Makes the curated set unless it is there: 1,024 clean clips, written as mp4 and then encoded -> the
    folder of its shards."""
    clips, shards, count = work.folder / "curated" / "clips", work.folder / "curated" / "latents", 1024
    index = shards / "shards.json"
    if not index.exists() or sum(shard["count"] for shard in json.loads(index.read_text())["shards"]) < count:
        for command in (("-m", "world.clips", clips, "--count", count, "--seed", 500, "--kind", "clean"),
                        ("data.py", "encode", clips, "--out", shards)):
            words = shlex.join(map(str, command))
            if subprocess.run(program(words), env=work.environment).returncode:
                raise InputError(f"`python {words}` failed")
    return shards


def at_a_rate(method, flags):
    """The flags, with the tuned learning rate if they have none, because the name of a run's folder has the
    rate."""
    return flags if "--learning_rate" in flags else (*flags, "--learning_rate", TUNED[method])


def align_folder(work, seed, method, flags=()):
    return work.folder / f"seed-{seed}" / named(method, at_a_rate(method, flags))


def train_aligned(work, runs):
    """Makes the runs [(seed, method, train_align flags)], after their reward models. Unless the flags say
    otherwise, prfl and refl make the preset's number of iterations, of two updates each, sft and rwr make the
    same number of updates, and the learning rates are those of TUNED."""
    train_reward_models(work, [(seed, reward_flags(method, flags)) for seed, method,
                         flags in runs if method != "sft"])
    shards, parts = curated(work), []
    for seed, method, flags in runs:
        two_updates = method in ("prfl", "refl")
        flags = at_a_rate(method, flags)
        default = {"--recipe": "paper"} if two_updates else {}  # these tables are about the paper's recipe
        default["--max_train_steps"] = work.preset["iterations"] * (1 if two_updates else 2)
        if method != "sft":
            default["--reward"] = reward_folder(work, seed, reward_flags(method, flags)) / "reward"
        added = [word for flag, value in default.items() if flag not in flags for word in (flag, value)]
        parts.append((align_folder(work, seed, method, flags), "transformer/config.json", "train_align.py",
                      "--method", method, "--seed", seed, "--data", shards, *added, *flags))
    work.run(parts)


def evaluations(work, name, rows_of, flags=()):
    """Evaluates the checkpoints rows_of {seed: {row: checkpoint folder}} -> [{row: {metric: array over
    videos}}], one dict for each seed, whose last row is "clean renders".

    flags: of evaluate.py, which choose the test videos and the sampler. name: a name for these flags. A
    checkpoint is evaluated once for each name, however many tables ask for it."""
    train_rewards(work, [base_of(flags)])
    where = lambda seed, folder: work.folder / f"seed-{seed}" / f"evaluation-{name}" / folder.name
    work.run([(where(seed, folder), "per_video.json", "evaluate.py", f"model={folder}", "--num_videos",
               work.preset["videos"], "--reward", reward_folder(work, seed, base_of(flags)) / "reward",
               *flags) for seed, rows in rows_of.items() for folder in rows.values()])

    def read(seed, folder, row="model"):
        metrics = json.loads((where(seed, folder) / "per_video.json").read_text())[row]
        return {metric: np.array(values) for metric, values in metrics.items()}

    return [{row: read(seed, folder) for row, folder in rows.items()}
            | {"clean renders": read(seed, next(iter(rows.values())), "clean renders")}
            for seed, rows in rows_of.items()]
