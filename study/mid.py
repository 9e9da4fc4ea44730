"""`python -m study.reproduce mid`: both recipes, and best of n, at a second size of the world: 48x48, 27
tokens per video instead of 12.

The base is checkpoints/mid. Learning rates and numbers of steps are those that were chosen at the first size.
"""
from formats.weights import SHIPPED
from report import claim_verdicts, claims_table
from search import parse_drops
from study.parts import MID, evaluations
from study.search import STEPS, passes_of
from study.steady import (
    RECIPES,
    Run,
    curve,
    curve_lines,
    folder_of,
    length,
    quality_table,
    stopped_at_its_best,
    train,
)

PAPER, STEADY = RECIPES
RUNS = {row: Run((*MID, *flags)) for row, flags in RECIPES.items()}


def mid(work):
    train(work, [(seed, run) for seed in work.seeds for run in RUNS.values()])
    best = f"{PAPER}, stopped at its best"
    paper_end, steady_end = f"{PAPER}, at the end", f"{STEADY}, at the end"
    spent = lambda n: f"best of {n} for {passes_of(parse_drops(n)) / STEPS:.1f} times the passes"
    base_searched, steady_searched = f"base, {spent(8)}", f"{STEADY}, {spent(4)}"
    base = SHIPPED["t2v mid"]
    paper = {seed: folder_of(work, seed, RUNS[PAPER]) for seed in work.seeds}
    steady = {seed: folder_of(work, seed, RUNS[STEADY]) for seed in work.seeds}
    ends = {seed: {"base": base, paper_end: paper[seed], steady_end: steady[seed]} for seed in work.seeds}
    stopped = {seed: {best: stopped_at_its_best(paper[seed])} for seed in work.seeds}
    evaluated = [
        evaluations(work, "mid", ends, MID),
        evaluations(work, "mid-at-its-best", stopped, MID),
        evaluations(work, "mid-best-of-8", {seed: {base_searched: base} for seed in work.seeds},
                    (*MID, "--best_of", 8, "--search", "drop")),
        evaluations(work, "mid-best-of-4", {seed: {steady_searched: steady[seed]} for seed in work.seeds},
                    (*MID, "--best_of", 4, "--search", "drop"))]
    order = ("base", base_searched, best, paper_end, steady_end, steady_searched, "clean renders")
    found = []
    for by_seed in zip(*evaluated):
        rows = {}
        for more in reversed(by_seed):      # all four have a row "clean renders"; the first one's is kept
            rows |= more
        found.append({row: rows[row] for row in order})
    cells, lines = quality_table(found)
    pairs = ((best, "base"), (steady_end, best), (steady_end, paper_end), (base_searched, "base"),
             (steady_searched, steady_end))
    claims = claim_verdicts([(*pair, "not in it") for pair in pairs],
                            {row: [f[row]["qualified"] for f in found] for row in order})
    by_recipe = {row: [curve(work, seed, run) for seed in work.seeds] for row, run in RUNS.items()}
    curves = {"The two recipes at 48x48": by_recipe}
    work.write("mid", "A second size: 9 frames of 48x48, 27 tokens", [
        f"{work.preset['videos']} test videos ({work.said_seeds()}). \"At the end\" is after {length(work)} "
        "iterations. The base is checkpoints/mid. Learning rates, batch size, N and K are those that were "
        "chosen at 32x32. Best of n drops candidates at search.py's default times.", "",
        *lines, *claims_table(claims), *curve_lines(work, "mid", curves)],
        {"rows": cells, "claims": claims, "curves": curves})
