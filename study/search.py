"""`python -m study.reproduce search` and `fooled`: best of n by the latent reward, and whether the annotator
can be trusted.

study/candidates.py samples every candidate of every video to the end, once. A plan says when candidates are
dropped, and `replay` then tells which candidate search.py would have kept with this plan.

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
from world.annotator import ANNOTATORS, AXES, LIMITS, annotate, grade
from world.annotator import PANEL as SEEN

SEED = 7_000                                                    # the seed of evaluate.py's test videos
REWARDED = (0.75, 0.5625, 0.375, 0.1875, 0.0)                   # times at which candidates can be dropped
STEPS = 16                                                      # Euler steps of a sample
GROUP = 8                                                       # candidates that one call samples
ROWS = {"base": "base", "SFT": "SFT", "paper": "PRFL, paper's recipe, stopped at its best",
        "steady": "PRFL, steady recipe"}
AIMS = (("base", "best of 8 in a chain", 0.85), ("steady", "best of 4 in a chain", 0.98),
        ("steady", "best of 4 at the end", 0.98))           # (row, plan, qualified rate), chosen beforehand
GUIDANCE = (4.0, 16.0, 64.0)                                    # scales of the guidance
PANEL = ("qualified", "physical", "deformity", "adherent", "speed", "brightness", "saturation")
ANNOTATED = ("qualified", "physical", "deformity", *SEEN, *LIMITS, "absent")    # in candidates.safetensors
OTHERS = "by another seed's reward"
HOW = {"at the end": "0:1", "once, at t = .38": ".375:1", "in a chain": None}   # {name: search.py's --drops}


def generators(work, seed):
    """{row of ROWS: checkpoint folder}, with None for the shipped base."""
    paper, steady = (recipe_folder(work, seed, row) for row in RECIPES)
    return {"base": None, "SFT": align_folder(work, seed, "sft"),
            "paper": stopped_at_its_best(paper) / "transformer", "steady": steady / "transformer"}


# ---- candidates: they are sampled once, and every plan chooses from them
def candidates_part(work, seed, row, *flags, others=False):
    """The part, as Work.run takes it, that samples candidates from the generator `row` with the noise of
    `seed`.

    The reward model is that of `seed` too or, with others=True, that of the next seed, which had no part in
    training the generator.
    """
    folder, seed_of_reward, key = generators(work, seed)[row], seed, (row, *flags)
    if others:
        seed_of_reward, key = (seed + 1) % len(work.seeds), (row, "others", *flags)
    generator = ()
    if folder is not None:
        generator = ("--transformer", folder)
    return (work.folder / f"seed-{seed}" / named("candidates", key), "candidates.safetensors",
            "-m", "study.candidates", *generator, "--reward", reward_folder(work, seed_of_reward) / "reward",
            "--seed", seed, "--num_videos", work.preset["videos"], *flags)


def candidates(work, wanted, others=False):
    """Samples the candidates that are missing -> {name: [{"rewards" or a name of ANNOTATED: [m, n, ...]}]},
    with one dict for each seed.

    wanted: {name: (row, [flags of a part, flags of the next part, ...])}, where each part samples other
    candidates of the same videos. others: as in `candidates_part`.
    """
    parts = {}
    for name, (row, groups) in wanted.items():
        for seed in work.seeds:
            parts[name, seed] = [candidates_part(work, seed, row, *flags, others=others) for flags in groups]
    work.run([part for groups in parts.values() for part in groups])
    found = {name: [] for name in wanted}
    for (name, _), groups in parts.items():
        files = [load_file(folder / last) for folder, last, *_ in groups]
        found[name].append({what: torch.cat([file[what] for file in files], 1) for what in files[0]})
    return found


def passes_of(cuts, share=1.0):
    """Forward passes of the generator that search.best_of makes for one video.

    cuts: the plan, as search.parse_drops returns it. share: the cost of a reward in forward passes, which is
    the share of the generator's blocks that the reward model has.
    """
    n, step, passes = cuts[0][1], 0, 0.0
    for t, keep in cuts[1:]:
        cut = round((1 - t) * STEPS)
        passes += n * (cut - step + share)
        step, n = cut, keep
    return passes + n * (STEPS - step)


def replay(rewards, cuts):
    """The number of the candidate that search.best_of keeps of each video -> [m]. cuts: the plan, for n
    candidates. rewards: [m, n or more, times], at the times REWARDED."""
    alive = torch.arange(cuts[0][1]).expand(len(rewards), -1)                                   # [m, n]
    for t, keep in cuts[1:]:
        at = min(range(len(REWARDED)), key=lambda i: abs(REWARDED[i] - t))
        alive = alive.gather(1, rewards[:, :, at].gather(1, alive).topk(keep, 1).indices)
    return alive[:, 0]


def kept(seeds, cuts, tolerance=1.0):
    """What the annotator says of the candidates that a plan keeps -> {name of PANEL: [seeds, m]}.

    seeds: a value of the dict that `candidates` returns. cuts: the plan. tolerance: as in `grade`.
    """
    rows = []
    for found in seeds:
        j = replay(found["rewards"], cuts)[:, None]
        chosen = {what: values.gather(1, j)[:, 0] for what, values in found.items() if what != "rewards"}
        rows.append(graded(chosen, tolerance))
    return {what: np.stack([row[what] for row in rows]) for what in PANEL}


def graded(found, tolerance=1.0):
    """What the annotator measured {name: [m]} -> {name of PANEL: [m]}. An axis has 1 where the video is
    qualified on it, else 0."""
    found = found | {"absent": found["absent"].bool(), "adherent": found["adherent"].bool()}
    found |= grade(found, tolerance)
    panel = {}
    for what in PANEL:
        values = found[what]
        if what in AXES:
            values = values == 2
        panel[what] = values.double().numpy()
    return panel


@torch.no_grad()
def clean_renders(m, split="test"):
    """What the annotator measures on clean renders of the same prompts, after the VAE -> {name: [m]}"""
    videos, prompts, _ = scene.make(m, SEED, "clean", split=split)
    vae = load_vae(SHIPPED["t2v"] / "vae")
    decoded = [to_pixels(vae.decode(vae.encode(from_pixels(some)))) for some in videos.split(128)]
    return annotate(torch.cat(decoded), prompts)


# ---- the tables
ONE = "one sample"


def label(n, how):
    return f"best of {n} {how}"


def search(work):
    train_recipes(work)
    train_aligned(work, [(seed, "sft", ()) for seed in work.seeds])
    most = work.preset["candidates"]
    counts = [n for n in (4, 8, 16) if n <= most]
    plans = {ONE: search_plan(1)}
    for n in counts:
        for how, text in HOW.items():
            plans[label(n, how)] = search_plan(n, text)
    passes = {plan: passes_of(cuts) for plan, cuts in plans.items()}
    groups = [("--first", first) for first in range(0, most, GROUP)]
    found = candidates(work, {row: (row, groups) for row in ROWS})
    values = {row: {plan: kept(found[row], cuts) for plan, cuts in plans.items()} for row in ROWS}
    cells = {row: {plan: summary(values[row][plan]["qualified"]) for plan in plans} for row in ROWS}
    columns = list(ROWS.values())
    lines = [f"{work.preset['videos']} held-out videos, with the same prompts and noise in every column "
             f"({work.said_seeds()}, each with its own noise, reward model, SFT and PRFL). {STEPS} Euler "
             "steps. A reward counts as a forward pass, as it runs all of the generator's blocks here. Every "
             "candidate was sampled once, and the choice of search.py is replayed. In a chain: half of the "
             "candidates stay at t = .75, a quarter at .56, one at .38.", "",
             *table(["qualified", "forward passes", "times one sample's", *columns],
                    [[plan, f"{passes[plan]:g}", f"{passes[plan] / STEPS:.1f}",
                      *(show(**cells[row][plan]) for row in ROWS)] for plan in plans])]

    any_of = {n: {row: summary([seed["qualified"][:, :n].amax(1).double().numpy() for seed in found[row]])
                  for row in ROWS} for n in counts}
    once = {t: search_plan(8, f"{t}:1") for t in REWARDED}
    once_cells = {t: {row: summary(kept(found[row], cuts)["qualified"]) for row in ROWS}
                  for t, cuts in once.items()}
    lines += ["The most that any choice could reach: the share of videos with a qualified candidate among "
              "n.", "",
              *table(["", *columns],
                     [[f"any of {n}", *(show(**any_of[n][row]) for row in ROWS)] for n in counts]),
              "Best of 8, where all but one are dropped at a single time t.", "",
              *table(["at t", "forward passes", *columns],
                     [[f"{t:g}", f"{passes_of(cuts):g}", *(show(**once_cells[t][row]) for row in ROWS)]
                      for t, cuts in once.items()])]

    if len(work.seeds) > 1:     # the reward model that PRFL trained against may have become useless for this
        aligned = ("paper", "steady")
        other = candidates(work, {row: (row, [("--count", 4)]) for row in aligned}, others=True)
        rows = []
        for how in HOW:
            plan = label(4, how)
            shown = []
            for row in aligned:
                panel = values[row][f"{plan}, {OTHERS}"] = kept(other[row], plans[plan])
                shown.append(show(**summary(panel["qualified"])))
            rows.append([plan, *shown])
        lines += ["Above, the reward model that PRFL trained against chooses among PRFL's candidates. Here "
                  "the reward model of another seed chooses:", "", *table(["", *aligned], rows)]

    means = lambda panel: {what: float(x.mean()) for what, x in panel.items()}
    hacking = {"clean renders": means(graded(clean_renders(work.preset["videos"])))}
    for row in ROWS:
        for plan in (ONE, *(label(n, "in a chain") for n in counts)):
            hacking[f"{ROWS[row]}, {plan}"] = means(values[row][plan])
    lines += ["Does the choice favour videos that only look good to the reward? Means, beside those of clean "
              "renders.", "",
              *table(["", *PANEL],
                     [[row, *(f"{panel[what]:.3f}" for what in PANEL)] for row, panel in hacking.items()])]

    chain, end = label(8, "in a chain"), label(4, "at the end")     # these two make about as many passes
    ways = other_ways(work) | {plan: (values["base"][plan], passes[plan]) for plan in (ONE, end, chain)}
    lines += ["Other ways to spend forward passes on the base are more Euler steps and guidance. Guidance "
              "moves x along the reward's gradient at t <= 1/2 (study/candidates.py); each gradient counts "
              "as three passes.", "",
              *table(["", "forward passes", *PANEL],
                     [[way, f"{cost:g}", show(**summary(panel["qualified"])),
                       *(f"{panel[what].mean():.3f}" for what in PANEL[1:])]
                      for way, (panel, cost) in ways.items()])]

    qualified = {f"{row}, {plan}": panel["qualified"] for row in ROWS for plan, panel in values[row].items()}
    for way, (panel, _) in ways.items():
        qualified[f"base, {way}"] = panel["qualified"]
    pairs = [(f"{row}, {chain}", f"{row}, {ONE}") for row in ROWS]
    pairs += [(f"{row}, {chain}", f"{row}, {end}") for row in ROWS]
    pairs += [(f"base, {chain}", f"base, {ONE}, {4 * STEPS} steps"), (f"steady, {ONE}", f"base, {chain}")]
    pairs += [(f"base, guided, scale {scale:g}, {end}", f"base, {end}") for scale in GUIDANCE]
    if len(work.seeds) > 1:
        pairs += [(f"{row}, {end}, {OTHERS}", f"{row}, {end}") for row in ("paper", "steady")]
    claims = claim_verdicts([(*pair, "not in it") for pair in pairs], qualified)
    aims = []
    for row, plan, aim in AIMS:
        cell = cells[row][plan]
        aims.append([f"{ROWS[row]}, {plan}", f"{aim:g}", show(**cell), verdict(*cell["interval"], at=aim)])
    lines += [*claims_table(claims), *table(["", "aim", "qualified", "above the aim"], aims)]
    panels = {}
    for row in ROWS:
        curves = {}
        for how in HOW:
            drawn = [ONE, *(label(n, how) for n in counts)]
            curves[how] = ([passes[plan] for plan in drawn], [cells[row][plan]["mean"] for plan in drawn])
        panels[ROWS[row]] = ("forward passes of a video", curves)
    plot(work.results / "search.png", panels)
    work.write("search", "Best of n by the latent reward, while sampling", lines, {
        "rows": cells, "passes": passes, "any": any_of, "once": once_cells, "panel": hacking,
        "validation": {row: [curve(work, seed, Run(flags)) for seed in work.seeds]
                       for row, flags in RECIPES.items()},
        "ways": {way: {"passes": cost, **summary(panel["qualified"])} for way, (panel, cost) in ways.items()},
        "claims": claims})


def other_ways(work):
    """Samples the base with more steps, and with guidance -> {way: ({name of PANEL: [seeds, m]}, forward
    passes)}"""
    longer = {f"{ONE}, {k * STEPS} steps": k * STEPS for k in (2, 4)}
    guided = {f"guided, scale {scale:g}": scale for scale in GUIDANCE}
    wanted = {}
    for way, steps in longer.items():
        wanted[way] = ("base", [("--count", 1, "--num_inference_steps", steps)])
    for way, scale in guided.items():
        wanted[way] = ("base", [("--count", 4, "--guidance", scale)])
    found = candidates(work, wanted)
    ways = {way: (kept(found[way], search_plan(1)), steps) for way, steps in longer.items()}
    cost = STEPS + 3 * STEPS / 2    # in half of the steps a reward and its gradient cost three passes more
    for way in guided:
        ways[way] = (kept(found[way], search_plan(1)), cost)
    for way in guided:
        ways[f"{way}, {label(4, 'at the end')}"] = (kept(found[way], search_plan(4, "0:1")), 4 * (cost + 1))
    return ways


def fooled(work):
    """Grades the videos of ROWS by a strict and a loose annotator too, and on wordings that nothing was
    trained on."""
    train_recipes(work)
    train_aligned(work, [(seed, "sft", ()) for seed in work.seeds])
    best = "base, best of 8 in a chain"
    names = ROWS | {best: best}
    flags = {"test": {row: ("--first", 0) for row in ROWS},     # the same candidates as in `search`
             "reworded": {row: ("--count", 1, "--split", "reworded") for row in ROWS}}
    flags["reworded"]["base"] = ("--count", 8, "--split", "reworded")
    values = {}
    for split in flags:
        found = candidates(work, {row: (row, [flags[split][row]]) for row in ROWS})
        clean = clean_renders(work.preset["videos"], split)
        for annotator, tolerance in ANNOTATORS.items():
            panels = {row: kept(found[row], search_plan(1), tolerance) for row in ROWS}
            panels[best] = kept(found["base"], search_plan(8), tolerance)
            panels["clean renders"] = {what: x[None] for what, x in graded(clean, tolerance).items()}
            values[split, annotator] = panels
    cells = {key: {row: summary(panel["qualified"]) for row, panel in panels.items()}
             for key, panels in values.items()}
    lines = [f"Share of {work.preset['videos']} videos that are qualified ({work.said_seeds()}). The strict "
             f"and the loose annotator have the firm one's limits times {ANNOTATORS['strict']:g} and "
             f"{ANNOTATORS['loose']:g}.", ""]
    for split, said in (("test", "test sentences"), ("reworded", "reworded")):
        rows = []
        for row, panel in values[split, "firm"].items():
            both_axes = (panel["physical"] * panel["deformity"]).mean()
            rows.append([names.get(row, row),
                         *(show(**cells[split, annotator][row]) for annotator in ANNOTATORS),
                         f"{panel['adherent'].mean():.3f}", f"{both_axes:.3f}"])
        lines += table([said, *ANNOTATORS, "true to the prompt", "both axes"], rows)
    lines += ["Reworded: sentences (REWORDED in world/scene.py) on which nothing was trained, chosen or "
              "validated, with other verbs and phrases, in another order. Only the words for colour, shape "
              "and direction are the world's.", ""]
    order = [("steady", "paper"), ("paper", "SFT"), ("SFT", "base"), (best, "base"), ("steady", best)]
    claims = {}
    for (split, annotator), panels in values.items():
        qualified = {row: panels[row]["qualified"] for row in names}
        claims[f"{split}, {annotator}"] = claim_verdicts([(*pair, "not in it") for pair in order], qualified)
    for where, found in claims.items():
        lines += [f"Orderings, {where}:", "", *claims_table(found)]
    work.write("fooled", "Is the annotator fooled? A strict and a loose one, and other wordings", lines, {
        "rows": {f"{split}, {annotator}": of for (split, annotator), of in cells.items()}, "claims": claims})
