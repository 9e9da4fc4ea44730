"""`python -m study.reproduce search_mismatched`: best of n by reward models that saw mismatched prompts.

study/search.py does this with the paper's reward models, which hardly read their prompt: videos that they
chose lost their prompts, and an aligned generator did not gain. Finished parts are kept in
results/search_mismatched_runs.json and are not made again, as those of study/endurance.py are.

Axes: m videos, n candidates.
"""
import numpy as np
from safetensors.torch import load_file

from report import claim_verdicts, claims_table, plot, show, summary, table
from search import parse_drops
from study import resampling
from study.endurance import TESTED, bits, keep, kept_in, part_of_case, reward_models
from study.few_labels import ALL_LABELS, BY_PARTS
from study.parts import part_of, reward_folder, train_reward_models
from study.search import HOW, ONE, PANEL, STEPS, graded, kept, label, passes_of

FILE = "search_mismatched_runs.json"
BASE, STEADY = "base", "PRFL, steady, 480 iterations"
BASE_165, STEADY_165 = (f"{row}, reward model of 165 labels" for row in (BASE, STEADY))
CASES = {BASE: ALL_LABELS, STEADY: ALL_LABELS, BASE_165: BY_PARTS[80], STEADY_165: BY_PARTS[80]}
UNTRAINED = (BASE, BASE_165)                    # of these rows only the case's reward model is used
COUNTS = (4, 8, 16)
PLANS = {ONE: parse_drops(1)} | {label(n, how): parse_drops(n, text) for n in COUNTS
                                 for how, text in HOW.items() if how != "once, at t = .38"}
OF_TABLE_1 = {"physical": "physical_qualified", "deformity": "deformity_qualified"}
RESAMPLED = {label(n, "resampled"): n for n in (2, 3, 4, 8)}    # by study/resampling.py


def search_part(work, seed, row, n=None):
    """The part, as Work.run takes it, that samples the candidates of the generator `row` to their end, or
    with n the part that searches with n candidates by study/resampling.py."""
    generator, *_ = part_of_case(work, seed, CASES[row])
    reward = reward_folder(work, seed, CASES[row].reward_flags())
    transformer, of = ("--transformer", generator / "transformer"), generator.name
    if row in UNTRAINED:
        transformer, of = (), f"base-{reward.name}"
    home = work.folder / f"seed-{seed}"
    flags = (*transformer, "--reward", reward / "reward", "--seed", seed, "--num_videos", TESTED)
    if n:
        return (home / f"resampled-{n}-{of}", "resampled.safetensors", "-m", "study.resampling", *flags,
                "--count", n)
    return (home / f"candidates-{of}", "candidates.safetensors", "-m", "study.candidates", *flags, "--count",
            max(COUNTS))


def entry_of_panel(panel):
    """{name of PANEL: [m]} -> the same as it is kept: verdicts as bits, the others as means."""
    return {what: bits(panel[what]) for what in PANEL[:4]} | {
        what: round(float(panel[what].mean()), 5) for what in PANEL[4:]}


def finished(work, wanted):
    """Makes those plans of [(seed, row)] that are not kept -> {(seed, row): {plan: {name of PANEL: [m]}}}"""
    found = kept_in(work, FILE)
    entries = {(seed, row): found.get(f"{row}, seed {seed}", {"plans": {}}) for seed, row in wanted}
    missing = [key for key in wanted if {*PLANS, *RESAMPLED} - set(entries[key]["plans"])]
    train_reward_models(work, reward_models(work, [(seed, CASES[row]) for seed, row in missing]))
    aligned = [(seed, part_of_case(work, seed, CASES[row])) for seed, row in missing
               if row not in UNTRAINED]
    work.run(list(dict(reversed(aligned)).values()))            # the first of a seed renders its clips
    work.run([part for _, part in aligned])
    for seed, row in missing:
        entry = entries[seed, row]
        if set(PLANS) - set(entry["plans"]):
            part = search_part(work, seed, row)
            work.run([part])
            entry["command"] = part_of(part[0])["command"].replace(str(work.folder), "runs")
            entry["commit"] = part_of(part[0])["commit"]
            one = [load_file(part[0] / part[1])]
            for plan, cuts in PLANS.items():
                panel = kept(one, cuts)
                entry["plans"][plan] = entry_of_panel({what: panel[what][0] for what in PANEL})
        for plan, n in RESAMPLED.items():
            if plan not in entry["plans"]:
                part = search_part(work, seed, row, n)
                work.run([part])
                only = {what: values[:, 0] for what, values in load_file(part[0] / part[1]).items()}
                entry["plans"][plan] = entry_of_panel(graded(only))
        found[f"{row}, seed {seed}"] = entry
        keep(work, FILE, found)
    return {key: entries[key]["plans"] for key in wanted}


def search_mismatched(work):
    report(work, finished(work, [(seed, row) for seed in work.seeds for row in CASES]))


def report(work, found):
    """Writes the table of those [(seed, row)] that are kept. found: as `finished` returns it."""
    rows, cells, qualified, drawn = {}, [], {}, {}
    for row in CASES:
        seeds = [seed for seed in work.seeds if (seed, row) in found]
        if not seeds:
            continue
        curves = drawn.setdefault(row, {"chain": ([], []), "resampled": ([], [])})
        passes = {plan: passes_of(cuts) for plan, cuts in PLANS.items()}
        passes |= {plan: resampling.passes(n) for plan, n in RESAMPLED.items()}
        for plan, cost in passes.items():
            if any(plan not in found[seed, row] for seed in seeds):             # kept before the plan existed
                continue
            panel = {what: np.array([[float(bit) for bit in found[seed, row][plan][what]] for seed in seeds])
                     for what in PANEL[:4]}
            qualified[f"{row}, {plan}"] = panel["qualified"]
            means = {what: float(panel[what].mean()) for what in PANEL[1:4]}
            means |= {what: float(np.mean([found[seed, row][plan][what] for seed in seeds]))
                      for what in PANEL[4:]}
            test = summary(panel["qualified"])
            # the names of results/table1.json
            rows[f"{row}, {plan}"] = test | {"qualified": test, "passes": cost} | {
                OF_TABLE_1.get(what, what): {"mean": mean} for what, mean in means.items()}
            cells.append([row, plan, f"{cost:g}", len(seeds), show(**test),
                          *(f"{mean:.3f}" for mean in means.values())])
            for how, (costs, rates) in curves.items():
                if how in plan or plan == ONE:
                    costs.append(cost)
                    rates.append(test["mean"])
    pairs = [(f"{row}, {label(n, how)}", f"{row}, {ONE}") for row in drawn for n in COUNTS
             for how in ("in a chain", "at the end")]
    cheaper_chain = {2: 4, 3: 8, 4: 8, 8: 16}                   # about as many passes, with others dropped
    for row in drawn:
        for plan, n in RESAMPLED.items():
            if f"{row}, {plan}" in qualified:
                pairs += [(f"{row}, {plan}", f"{row}, {other}")
                          for other in (ONE, label(cheaper_chain[n], "in a chain"))]
    # with the same reward model: to search with 4 candidates, or to align
    pairs += [(f"{base}, {label(4, 'resampled')}", f"{aligned}, {ONE}")
              for base, aligned in ((BASE, STEADY), (BASE_165, STEADY_165))
              if {base, aligned} <= drawn.keys()]
    claims = claim_verdicts([(*pair, "not in it") for pair in pairs], qualified)
    panels = {}
    for row, curves in drawn.items():
        title = "the untrained base" if row in UNTRAINED else "aligned generators"
        _, shown = panels.setdefault(title, ("forward passes of a video", {}))
        shown |= {f"{row}, {how}": curve for how, curve in curves.items()}
    plot(work.results / "search_mismatched.png", panels)
    lines = [f"{TESTED} held-out videos, {STEPS} Euler steps. The reward model that chooses is the one that "
             "the generator was aligned with; a quarter of its batches had another video's prompt and the "
             "label bad. A reward counts as a forward pass. In a chain: half of the candidates stay at t = "
             ".75, a quarter at .56, one at .38. Resampled: after each step from t = .81 to .44 each place "
             "is filled anew by one of the candidates, drawn by their rewards, and a copy gets new noise; "
             "the best one stays at .38 (search.py).", "",
             *table(["generator", "plan", "forward passes", "seeds", *PANEL], cells), *claims_table(claims)]
    work.write("search_mismatched", "Best of n by reward models that saw mismatched prompts", lines,
               {"rows": rows, "claims": claims})
