"""`python -m study.reproduce search` and `fooled`: best of n by the latent reward, and whether the annotator can be trusted.

Every candidate of every video is sampled to its end once (study/candidates.py); `replay` then says what search.py would have
kept by any plan of cuts.

Axes: m videos, n candidates.
"""
from study.parts import align_folder, named, reward_folder
from study.steady import RECIPES, recipe_folder, stopped_at_its_best


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
