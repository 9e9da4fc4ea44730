"""`python -m study.reproduce search` and `fooled`: best of n by the latent reward, and whether the annotator can be trusted.

Every candidate of every video is sampled to its end once (study/candidates.py); `replay` then says what search.py would have
kept by any plan of cuts.

Axes: m videos, n candidates.
"""
import json

from formats import runs
from study.parts import align_folder, named, reward_folder, train_rewards

RECIPES = {  # rows of PRFL: train_align flags, 480 iterations, every checkpoint kept
    "PRFL, paper's recipe": ("--keep", 12, "--rewarded_step", "per_batch", "--rollout_passes", 0, "--reward_loss", "linear"),
    "PRFL, steady recipe": ("--keep", 12, "--rewarded_step", "per_video", "--rollout_passes", 4, "--reward_loss", "logsigmoid")}


def recipe_folder(work, seed, row):
    return work.folder / f"seed-{seed}" / named("steady", RECIPES[row])


def train_recipes(work):
    """Both recipes, 480 iterations, validated every 40 (so not on shards: the world's own clips)."""
    train_rewards(work, [()])
    work.run([(recipe_folder(work, seed, row), "transformer/config.json", "train_align.py", "--method", "prfl", "--seed", seed,
               "--curated_dir", work.folder / f"seed-{seed}" / "curated", "--reward", reward_folder(work, seed) / "reward",
               "--learning_rate", 1e-4, "--max_train_steps", 480, "--validation_steps", 40, "--num_validation", 256, *flags)
              for seed in work.seeds for row, flags in RECIPES.items()])


def stopped_at_its_best(folder):
    """The checkpoint that did best on the validation videos: what somebody who watches would stop at."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    best = max((row["validation_qualified"], row["step"]) for row in rows if row["step"] and "validation_qualified" in row)
    return dict(runs.list_checkpoints(folder))[best[1]]


def generators(work, seed):
    """{row: folder}, None for the shipped base."""
    paper, steady = RECIPES
    return {"base": None, "SFT": align_folder(work, seed, "sft"),
            f"{paper}, stopped at its best": stopped_at_its_best(recipe_folder(work, seed, paper)) / "transformer",
            steady: recipe_folder(work, seed, steady) / "transformer"}


def candidates_part(work, seed, name, transformer, *flags):
    """A part that samples all candidates of a generator's videos with the noise, and by the reward model, of `seed`."""
    generator = () if transformer is None else ("--transformer", transformer)
    return (work.folder / f"seed-{seed}" / named("candidates", (name, *flags)), "candidates.safetensors",
            "-m", "study.candidates", *generator, "--reward", reward_folder(work, seed) / "reward", "--seed", seed,
            "--num_videos", work.preset["videos"], *flags)
