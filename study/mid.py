"""`python -m study.reproduce mid`: the recipes and best of n at a second size of the world, 48x48, 27 tokens in place of 12.

The base is checkpoints/mid. Every rate and number of steps is what was chosen at the first size.
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
    best, paper_end, steady_end = f"{PAPER}, stopped at its best", f"{PAPER}, at the end", f"{STEADY}, at the end"
    spent = lambda n: f"best of {n} for {passes_of(parse_drops(n)) / STEPS:.1f} times the passes"
    base_searched, steady_searched = f"base, {spent(8)}", f"{STEADY}, {spent(4)}"
    order = ("base", base_searched, best, paper_end, steady_end, steady_searched, "clean renders")
    of = lambda seed, row: folder_of(work, seed, RUNS[row])
    evaluated = lambda name, rows, *flags: evaluations(work, name, {seed: rows(seed) for seed in work.seeds}, (*MID, *flags))
    parts = (evaluated("mid", lambda seed: {"base": SHIPPED["t2v mid"], paper_end: of(seed, PAPER), steady_end: of(seed, STEADY)}),
             evaluated("mid-at-its-best", lambda seed: {best: stopped_at_its_best(of(seed, PAPER))}),
             evaluated("mid-best-of-8", lambda seed: {base_searched: SHIPPED["t2v mid"]}, "--best_of", 8),
             evaluated("mid-best-of-4", lambda seed: {steady_searched: of(seed, STEADY)}, "--best_of", 4))
    found = [{row: next(rows[row] for rows in seed if row in rows) for row in order} for seed in zip(*parts)]
    cells, lines = quality_table(found)
    claims = claim_verdicts([(*pair, "not in it") for pair in (
        (best, "base"), (steady_end, best), (steady_end, paper_end), (base_searched, "base"), (steady_searched, steady_end))],
        {row: [f[row]["qualified"] for f in found] for row in order})
    curves = {"The two recipes at 48x48": {row: [curve(work, seed, run) for seed in work.seeds] for row, run in RUNS.items()}}
    work.write("mid", "A second size: 9 frames of 48x48, 27 tokens", [
        f"{work.preset['videos']} test videos ({work.said_seeds()}); at the end: after {length(work)} iterations. The base "
        "is checkpoints/mid; learning rates, batch, N and K are those chosen at 32x32. Best of n: search.py's default cuts.", "",
        *lines, *claims_table(claims), *curve_lines(work, "mid", curves)], {"rows": cells, "claims": claims, "curves": curves})
