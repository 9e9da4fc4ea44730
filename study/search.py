"""`python -m study.reproduce search` and `fooled`: best of n by the latent reward, and whether the annotator can be trusted.

Every candidate of every video is sampled to its end once (study/candidates.py); `replay` then says what search.py would have
kept by any plan of cuts.

Axes: m videos, n candidates.
"""
import numpy as np
import torch
from safetensors.torch import load_file

from families import load_vae
from formats.video import from_pixels, to_pixels
from formats.weights import SHIPPED
from report import claim_verdicts, claims_table, plot, show, summary, table, verdict
from search import parse_drops as search_plan
from study.parts import align_folder, named, reward_folder, train_aligned
from study.steady import RECIPES, Run, curve, recipe_folder, stopped_at_its_best, train_recipes
from world import scene
from world.annotator import ANNOTATORS, AXES, annotate, grade

SEED = 7_000                                                    # that of evaluate.py's test videos
REWARDED = (0.75, 0.5625, 0.375, 0.1875, 0.0)                   # the times at which candidates can be dropped
STEPS, GROUP = 16, 8                                            # of a sample; candidates that one part makes
ROWS = {"base": "base", "SFT": "SFT", "paper": "PRFL, paper's recipe, stopped at its best", "steady": "PRFL, steady recipe"}
AIMS = (("base", "best of 8 in a chain", 0.85), ("steady", "best of 4 in a chain", 0.98), ("steady", "best of 4 at the end", 0.98))
GUIDANCE = (4.0, 16.0, 64.0)
PANEL = ("qualified", "physical", "deformity", "adherent", "speed", "brightness", "saturation")
OTHERS = "by another seed's reward"
HOW = {"at the end": "0:1", "once, at t = .38": ".375:1", "in a chain": None}                  # --drops


def generators(work, seed):
    """{row: folder}, None for the shipped base."""
    paper, steady = (recipe_folder(work, seed, row) for row in RECIPES)
    return {"base": None, "SFT": align_folder(work, seed, "sft"), "paper": stopped_at_its_best(paper) / "transformer",
            "steady": steady / "transformer"}


# ---- candidates: sampled once, chosen from as often as there are plans
def candidates_part(work, seed, row, *flags, others=False):
    """A part that samples candidates of a generator's videos with the noise, and by the reward model, of `seed`; others: by
    the reward model of the next seed, which the generator was not trained with."""
    folder, judging = generators(work, seed)[row], (seed + others) % len(work.seeds)
    generator = () if folder is None else ("--transformer", folder)
    return (work.folder / f"seed-{seed}" / named("candidates", (row, *others * ("others",), *flags)), "candidates.safetensors",
            "-m", "study.candidates", *generator, "--reward", reward_folder(work, judging) / "reward", "--seed", seed,
            "--num_videos", work.preset["videos"], *flags)


def candidates(work, wanted, others=False):
    """wanted {name: (row, [flags of one part, of the next, ...])} -> {name: [seeds] of {what study/candidates.py wrote:
    [m, n, ...]}}. What is not there is sampled."""
    parts = {name: [[candidates_part(work, seed, row, *flags, others=others) for flags in groups] for seed in work.seeds]
             for name, (row, groups) in wanted.items()}
    work.run([part for seeds in parts.values() for group in seeds for part in group])
    found = {}
    for name, seeds in parts.items():
        files = [[load_file(folder / last) for folder, last, *_ in group] for group in seeds]
        found[name] = [{what: torch.cat([file[what] for file in group], 1) for what in group[0]} for group in files]
    return found


def passes_of(cuts, share=1.0):
    """Forward passes that search.best_of makes for a video; share: of the generator's blocks in the reward model."""
    n, step, passes = cuts[0][1], 0, 0.0
    for t, keep in cuts[1:]:
        cut = round((1 - t) * STEPS)
        passes += n * (cut - step + share)
        step, n = cut, keep
    return passes + n * (STEPS - step)


def replay(rewards, cuts):
    """Which candidate search.best_of keeps of each video -> [m]. rewards [m, >= n, times] at REWARDED."""
    alive = torch.arange(cuts[0][1]).expand(len(rewards), -1)                                   # [m, n]
    for t, keep in cuts[1:]:
        at = min(range(len(REWARDED)), key=lambda i: abs(REWARDED[i] - t))
        alive = alive.gather(1, rewards[:, :, at].gather(1, alive).topk(keep, 1).indices)
    return alive[:, 0]


def kept(seeds, cuts, tolerance=1.0):
    """[seeds] of `candidates` -> {what of PANEL: [seeds, m]} of the candidates that a plan of cuts keeps, judged by an
    annotator of that tolerance."""
    rows = []
    for found in seeds:
        j = replay(found["rewards"], cuts)[:, None]
        chosen = {what: values.gather(1, j)[:, 0] for what, values in found.items() if what != "rewards"}
        rows.append(graded(chosen, tolerance))
    return {what: np.stack([row[what] for row in rows]) for what in PANEL}


def graded(found, tolerance=1.0):
    """What the annotator found [m] -> {what of PANEL: [m]}, the axes as qualified or not."""
    found = found | {what: found[what].bool() for what in ("absent", "adherent")}
    found |= grade(found, tolerance)
    return {what: (found[what] == 2 if what in AXES else found[what]).double().numpy() for what in PANEL}


@torch.no_grad()
def clean_renders(m, split="test"):
    """What the annotator finds in clean renders of the same prompts, after the VAE -> {what: [m]}"""
    videos, prompts, _ = scene.make(m, SEED, "clean", split=split)
    vae = load_vae(SHIPPED["t2v"] / "vae")
    return annotate(torch.cat([to_pixels(vae.decode(vae.encode(from_pixels(x)))) for x in videos.split(128)]), prompts)


# ---- the tables
def label(n, how=""):
    return f"best of {n} {how}".strip() if n > 1 else "one sample"


def search(work):
    train_recipes(work)
    train_aligned(work, [(seed, "sft", ()) for seed in work.seeds])
    most = work.preset["candidates"]
    counts = [n for n in (4, 8, 16) if n <= most]
    plans = {label(1): search_plan(1)} | {label(n, how): search_plan(n, text) for n in counts for how, text in HOW.items()}
    found = candidates(work, {row: (row, [("--first", first) for first in range(0, most, GROUP)]) for row in ROWS})
    values = {row: {plan: kept(seeds, cuts) for plan, cuts in plans.items()} for row, seeds in found.items()}
    cells = {row: {plan: summary(panel["qualified"]) for plan, panel in panels.items()} for row, panels in values.items()}
    shown = lambda plan: [show(**cells[row][plan]) for row in ROWS]
    lines = [f"{work.preset['videos']} held-out videos, the same prompts and noise in every column ({work.said_seeds()}: of the "
             f"noise, and of the reward model, SFT and PRFL). {STEPS} Euler steps. A reward counts as a forward pass, as it "
             "runs all of the generator's blocks here. Every candidate was sampled once; what search.py keeps of them is "
             "replayed. In a chain: half of the candidates stay at t = .75, a quarter at .56, one at .38.", "",
             *table(["qualified", "forward passes", "times one sample's", *ROWS.values()],
                    [[plan, f"{passes_of(cuts):g}", f"{passes_of(cuts) / STEPS:.1f}", *shown(plan)]
                     for plan, cuts in plans.items()])]

    any_of = lambda seeds, n: summary([seed["qualified"][:, :n].amax(1).double().numpy() for seed in seeds])
    held = {n: {row: any_of(found[row], n) for row in ROWS} for n in counts}
    once = {t: search_plan(8, f"{t}:1") for t in REWARDED}
    once_cells = {t: {row: summary(kept(found[row], cuts)["qualified"]) for row in ROWS} for t, cuts in once.items()}
    lines += ["The most that any choice could reach: videos with a qualified candidate among n.", "",
              *table(["", *ROWS.values()], [[f"any of {n}", *(show(**cell) for cell in of.values())] for n, of in held.items()]),
              "Best of 8, all but one dropped at one time t.", "",
              *table(["at t", "forward passes", *ROWS.values()], [
                  [f"{t:g}", f"{passes_of(cuts):g}", *(show(**cell) for cell in once_cells[t].values())]
                  for t, cuts in once.items()])]

    if len(work.seeds) > 1:                                     # does the reward it was trained with still tell its videos apart?
        other = candidates(work, {row: (row, [("--count", 4)]) for row in ("paper", "steady")}, others=True)
        for plan in (plan for plan in plans if plan.startswith(label(4))):
            for row, seeds in other.items():
                values[row][f"{plan}, {OTHERS}"] = kept(seeds, plans[plan])
        lines += ["PRFL was trained with the reward that chooses above. By the reward model of another seed:", "",
                  *table(["", *other], [[plan, *(show(**summary(values[row][f"{plan}, {OTHERS}"]["qualified"])) for row in other)]
                                        for plan in plans if plan.startswith(label(4))])]

    clean = graded(clean_renders(work.preset["videos"]))
    hacking = {"clean renders": {what: float(x.mean()) for what, x in clean.items()}} | {
        f"{ROWS[row]}, {plan}": {what: float(x.mean()) for what, x in values[row][plan].items()}
        for row in ROWS for plan in plans if plan == label(1) or plan.endswith("chain")}
    lines += ["Does the choice favour what only looks good to the reward? Means, beside clean renders'.", "",
              *table(["", *PANEL], [[row, *(f"{panel[what]:.3f}" for what in PANEL)] for row, panel in hacking.items()])]

    ways = other_ways(work) | {plan: (values["base"][plan], passes_of(plans[plan]))
                               for plan in (label(1), label(4, "at the end"), label(8, "in a chain"))}
    lines += ["Other ways to spend forward passes on the base: more Euler steps; guidance, x moved along the reward's gradient at "
              "t <= 1/2 (study/candidates.py), where the gradient counts as three passes.", "",
              *table(["", "forward passes", *PANEL], [[way, f"{cost:g}", show(**summary(panel["qualified"])),
                                                      *(f"{panel[what].mean():.3f}" for what in PANEL[1:])]
                                                     for way, (panel, cost) in ways.items()])]

    by = {f"{row}, {plan}": panel["qualified"] for row in ROWS for plan, panel in values[row].items()}
    by |= {f"base, {way}": panel["qualified"] for way, (panel, _) in ways.items()}
    chain, end = label(8, "in a chain"), label(4, "at the end")                                 # about as many passes
    claims = claim_verdicts([(*pair, "not in it") for pair in (
        *((f"{row}, {chain}", f"{row}, {label(1)}") for row in ROWS), *((f"{row}, {chain}", f"{row}, {end}") for row in ROWS),
        (f"base, {chain}", f"base, one sample, {4 * STEPS} steps"), (f"steady, {label(1)}", f"base, {chain}"),
        *((f"base, guided, scale {scale:g}, {end}", f"base, {end}") for scale in GUIDANCE),
        *((f"{row}, {end}, {OTHERS}", f"{row}, {end}") for row in ("paper", "steady") if len(work.seeds) > 1))], by)
    lines += [*claims_table(claims), *table(["", "aim", "qualified", "above the aim"], [
        [f"{ROWS[row]}, {plan}", f"{aim:g}", show(**cells[row][plan]), verdict(*cells[row][plan]["interval"], at=aim)]
        for row, plan, aim in AIMS])]
    plot(work.results / "search.png", {ROWS[row]: ("forward passes of a video", {
        how: zip(*[(passes_of(plans[plan]), cells[row][plan]["mean"]) for plan in (label(1), *(label(n, how) for n in counts))])
        for how in HOW}) for row in ROWS})
    work.write("search", "Best of n by the latent reward, while sampling", lines, {
        "rows": cells, "passes": {plan: passes_of(cuts) for plan, cuts in plans.items()}, "any": held, "once": once_cells,
        "panel": hacking,
        "validation": {row: [curve(work, seed, Run(flags)) for seed in work.seeds] for row, flags in RECIPES.items()},
        "ways": {way: {"passes": cost, **summary(panel["qualified"])} for way, (panel, cost) in ways.items()},
        "claims": claims})


def other_ways(work):
    """On the base, {way: ({what of PANEL: [seeds, m]}, forward passes)}"""
    longer = {f"one sample, {k * STEPS} steps": k * STEPS for k in (2, 4)}
    guided = {f"guided, scale {scale:g}": scale for scale in GUIDANCE}
    found = candidates(work, {way: ("base", [("--count", 1, "--num_inference_steps", steps)]) for way, steps in longer.items()}
                       | {way: ("base", [("--count", 4, "--guidance", scale)]) for way, scale in guided.items()})
    cost = STEPS + 3 * STEPS / 2                                # a reward and its gradient, three passes, in half of the steps
    return ({way: (kept(found[way], search_plan(1)), steps) for way, steps in longer.items()}
            | {way: (kept(found[way], search_plan(1)), cost) for way in guided}
            | {f"{way}, {label(4, 'at the end')}": (kept(found[way], search_plan(4, "0:1")), 4 * (cost + 1)) for way in guided})


def fooled(work):
    """Headline rows by a strict and a loose annotator, and in wordings the world never uses."""
    train_recipes(work)
    train_aligned(work, [(seed, "sft", ()) for seed in work.seeds])
    best = "base, best of 8 in a chain"
    names = ROWS | {best: best}
    flags = {"test": dict.fromkeys(ROWS, ("--first", 0)),       # search's own candidates
             "reworded": {row: ("--count", 8 if row == "base" else 1, "--split", "reworded") for row in ROWS}}
    values = {}
    for split in flags:
        found = candidates(work, {row: (row, [of]) for row, of in flags[split].items()})
        clean = clean_renders(work.preset["videos"], split)
        for annotator, tolerance in ANNOTATORS.items():
            values[split, annotator] = {row: kept(seeds, search_plan(1), tolerance) for row, seeds in found.items()} | {
                best: kept(found["base"], search_plan(8), tolerance),
                "clean renders": {what: x[None] for what, x in graded(clean, tolerance).items()}}
    cells = {key: {row: summary(panel["qualified"]) for row, panel in of.items()} for key, of in values.items()}
    lines = [f"Qualified, of {work.preset['videos']} videos ({work.said_seeds()}). Strict, loose: the annotator's limits times "
             f"{ANNOTATORS['strict']:g} and {ANNOTATORS['loose']:g}.", ""]
    for split, said in (("test", "test sentences"), ("reworded", "reworded")):
        lines += table([said, *ANNOTATORS, "true to the prompt", "both axes"], [
            [names.get(row, row), *(show(**cells[split, annotator][row]) for annotator in ANNOTATORS),
             f"{panel['adherent'].mean():.3f}", f"{(panel['physical'] * panel['deformity']).mean():.3f}"]
            for row, panel in values[split, "firm"].items()])
    lines += ["Reworded: sentences that no training, choice or validation saw (world/scene.py, REWORDED), with other verbs and "
              "phrases, in another order. Only the words for colour, shape and direction are the world's.", ""]
    order = [("steady", "paper"), ("paper", "SFT"), ("SFT", "base"), (best, "base"), ("steady", best)]
    claims = {f"{split}, {annotator}": claim_verdicts([(*pair, "not in it") for pair in order],
                                                   {row: of[row]["qualified"] for row in names})
              for (split, annotator), of in values.items()}
    for where, found in claims.items():
        lines += [f"Orderings, {where}:", "", *claims_table(found)]
    work.write("fooled", "Is the annotator fooled? A strict and a loose one, and other wordings", lines, {
        "rows": {f"{split}, {annotator}": of for (split, annotator), of in cells.items()}, "claims": claims})
