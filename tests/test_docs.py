"""README.md and docs/ are true: figures are those of results/*.json; files, flags and commands exist."""
import dataclasses
import importlib
import json
import re
import shlex
from pathlib import Path
from statistics import fmean, stdev

import pytest

import families
from model import PRESETS
from scale import plan
from study import wan22
from study.elsewhere import BASE_SEARCHED, GENERATORS, PAPER, STEADY, STEADY_SEARCHED
from study.search import AIMS
from study.search_mismatched import BASE_165, STEADY_165

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "LOG.md", "docs/your_model.md", "docs/scale.md", "docs/results.md",
         "docs/metrics.md")
FIGURE = re.compile(r"(?<![\w.,])[+-]?(?:\d*\.\d+|\d+ %)")     # .874, +.143, 1.21, 99.6 %


def load(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def section(page, title):
    """The text under a heading, on one line."""
    behind = (ROOT / page).read_text().split(f"\n{title}\n")[1]
    return " ".join(re.split(r"^#+ ", behind, maxsplit=1, flags=re.M)[0].split())


def number(value, digits=3, sign=""):
    """.874, +.143, 1.21: as the pages write it"""
    text = f"{value:{sign}.{digits}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def with_interval(cell, digits=3, sign="", key="mean"):
    low, high = (number(x, digits, sign) for x in cell["interval"])
    return f"{number(cell[key], digits, sign)} [{low}, {high}]"


def alignment_row(title, row):
    """A row of the README's tables from one of table1.json's or evaluate.py's."""
    cells = [with_interval(row["qualified"])]
    cells += [number(row[name]["mean"])
              for name in ("physical_qualified", "deformity_qualified", "adherent", "speed")]
    return f"| {title} | {' | '.join(cells)} |"


def test_the_readmes_table_of_results():
    rows, text = load("table1")["rows"] | load("steady")["rows"], (ROOT / "README.md").read_text()
    searched = load("search_mismatched")["rows"]
    aligned = "PRFL, steady, 480 iterations"
    rows |= load("endurance")["rows"] | {
        f"{row}, best of {n}": searched[f"{row}, best of {n} resampled"]
        for row, n in (("base", 2), ("base", 4), (BASE_165, 4), (aligned, 2))}
    table = {"base": "base", "base, best of 2 by a reward model (mismatched)": "base, best of 2",
             "base, best of 4 by a reward model (mismatched)": "base, best of 4",
             "base, best of 4 by a reward model of 165 labels (mismatched)": f"{BASE_165}, best of 4",
             "RWR": "RWR", "SFT": "SFT",
             "SFT, for PRFL's wall time (595 updates)": "SFT, equal time",
             "RGB ReFL, first frame": "RGB ReFL, first frame", "RGB ReFL, all frames": "RGB ReFL, all frames",
             "PRFL, the paper's recipe": "PRFL",
             "PRFL, the paper's recipe, 480 iterations": "PRFL, paper's recipe, at the end",
             "PRFL, the paper's recipe, 480 iterations, mismatched":
                 "paper, constant 0.0001, mismatched 0.25, 480",
             "PRFL, steady at a constant rate of 1e-4, 960 iterations, mismatched":
                 "steady, constant 0.0001, mismatched 0.25, 960",
             "PRFL, the steady recipe, 480 iterations, mismatched":
                 "steady, linear 0.0002, mismatched 0.25, 480",
             "PRFL, the steady recipe, 960 iterations, mismatched":
                 "steady, linear 0.0002, mismatched 0.25, 960",
             "PRFL, the steady recipe, 480 iterations, best of 2, mismatched": f"{aligned}, best of 2",
             "clean renders": "clean renders"}
    expected = [alignment_row(title, rows[name]) for title, name in table.items()]
    text = text.split("\n## Results\n")[1].split("Each comparison")[0]
    assert re.findall(r"^\| .*\d.* \|$", text, re.M) == expected


def claims():
    """-> {section of docs/results.md: [what it has to say, figures from its results file]}"""
    def of(name):
        """rows by qualified or average accuracy, differences by claim"""
        found = load(name)
        return found["rows"], {claim["claim"]: claim for claim in found["claims"]}

    def gap(claims, name, flip=False):
        """The difference of a claim, and its interval; flip: of worse above better, without signs"""
        claim = claims[name]
        if flip:
            low, high = sorted(abs(x) for x in claim["interval"])
            return f"{number(abs(claim['difference']))} [{number(low)}, {number(high)}]"
        return with_interval(claim, sign="+", key="difference")

    said = {}
    rows, differ = of("table1")
    md = (ROOT / "results" / "table1.md").read_text().split("Sampled in 40")[0]
    forty = dict(re.findall(r"^\| (.*?) \| 0(\.\d+ \[0\.\d+, 0\.\d+\]) \|$", md, re.M))
    half = "SFT, half as many updates"
    said["## Table 1: methods"] = [
        f"At equal updates PRFL is above it by {gap(differ, 'PRFL above RGB ReFL, all frames')}",
        f"At equal wall time PRFL is above it by "
        f"{gap(differ, 'PRFL above RGB ReFL, all frames, equal time')}",
        f"At equal wall time PRFL is above SFT by {gap(differ, 'PRFL above SFT, equal time')}",
        f"SFT is above RWR by {gap(differ, 'SFT above RWR')}",
        f"the difference is {gap(differ, 'RWR above RGB ReFL, first frame')}",
        f"reach {with_interval(rows[half]['qualified'])}",
        f"those SFT updates cannot be told: the difference is "
        f"{gap(differ, f'RGB ReFL, first frame above {half}')}",
        f"above those SFT updates by {gap(differ, f'RGB ReFL, all frames above {half}')}",
        f"move at {number(rows['PRFL']['speed']['mean'])} frame widths per frame, clean renders at "
        f"{number(rows['clean renders']['speed']['mean'])}.",
        f"brightness of PRFL's videos is {number(rows['PRFL']['brightness']['mean'])}, that of clean renders "
        f"{number(rows['clean renders']['brightness']['mean'])}",
        f"the base reaches {forty['base'].split()[0]}, SFT at equal time "
        f"{forty['SFT, equal time'].split()[0]}, and PRFL "
        f"{forty['PRFL'].replace('0.', '.')}"]

    rows, differ = of("table2")
    q2 = lambda name: number(rows[name]["qualified"]["mean"])
    said["## Table 2: image-to-video"] = [
        f"reaches {q2('base')}, SFT {q2('SFT')}, PRFL {with_interval(rows['PRFL']['qualified'])}, and clean "
        f"renders {q2('clean renders')}", f"above SFT by {gap(differ, 'PRFL above SFT')}",
        f"dynamic degree is {number(rows['base']['dynamic']['mean'])}, PRFL's "
        f"{number(rows['PRFL']['dynamic']['mean'])}"]

    rows, differ = of("table3")
    cell = lambda name, metric="qualified": number(rows[name][metric]["mean"])
    said["## Table 3: which part of the trajectory is rewarded"] = [
        f"all of it reaches {cell('full')}, late steps {cell('late')}, middle steps {cell('middle')}, and "
        f"early steps {cell('early')}",
        f"the difference is {gap(differ, 'middle above late')}",
        f"motion physical ({cell('early', 'physical_qualified')}) and loses the prompt: "
        f"{cell('early', 'adherent')} are adherent, where the base has {cell('base', 'adherent')}",
        f"{cell('middle', 'deformity_qualified')} are not deformed"]

    table4 = load("table4")
    ratio = {r["setting"]: with_interval(r, 2, key="ratio")
             for r in table4["ratios"] if r["row"] == "RGB ReFL, first frame"}
    recipes = next(r for r in table4["recipes"] if r["setting"] == "N = 40, K = 8")
    memory = {c["row"]: round(c["bytes"] / 1e6)
              for c in table4["cells"] if (c["frames"], c["size"]) == (81, "64*64")}
    paper = {r["paper"] for r in table4["ratios"] if r["setting"] == "N = 40, K = 2"}
    said["## Table 4: cost"] = [
        f"paper's ratio is {paper.pop()}", f"of 8 blocks the ratio is {ratio['N = 16, K = 8']}",
        f"ratio is {ratio['N = 40, K = 8']}",
        f"ratio is {ratio['N = 40, K = 2']}",
        f"takes {with_interval(recipes['PRFL, steady recipe / PRFL'], 2)} of the time",
        f"takes {with_interval(recipes['RGB ReFL, first frame / PRFL, steady recipe'], 2)} times as long",
        f"PRFL takes {memory['PRFL']} MB",
        f"takes {memory['RGB ReFL, first frame']} MB there with the first frame and "
        f"{memory['RGB ReFL, all frames']} MB",
        f"all frames take {memory['the same, --decoder_checkpointing']} MB",
        f"through at most {dict((w[0], w[3]) for w in table4['wan'])['wan2.1-t2v-14b']} decoded frames"]

    rows, differ = of("loss")
    one = "PRFL: linear, lambda 1, 1 step"
    q3 = lambda name: number(rows[name]["qualified"]["mean"])
    said["## PRFL's own choices"] = [
        f"Lambda 0.1, 1 and 5 reach {q3('lambda 0.1')}, {q3(one)} and {q3('lambda 5')}",
        f"loss reaches {q3('sigmoid hinge (released code)')}",
        f"lambda 30 reaches {q3('sigmoid hinge, lambda 30')}. The linear loss is below it by "
        f"{gap(differ, f'{one} above sigmoid hinge, lambda 30', flip=True)}",
        f"-log sigmoid(r) reaches {q3('-log sigmoid')}. The linear loss is below it by "
        f"{gap(differ, f'{one} above -log sigmoid', flip=True)}",
        f"Two steps with gradients reach {q3('2 steps with gradients')} and four reach "
        f"{q3('4 steps with gradients')}",
        f"qualified: {q3('without SFT updates')}"]

    curves = load("hacking")["curves"]
    at = lambda run, name: dict(zip(*curves[run][name][:2]))
    proxy, quality = at("PRFL", "proxy reward"), at("PRFL", "qualified")
    alone = at("without SFT updates", "qualified")
    peak = max(quality.values())
    assert number(quality[80]) == number(quality[120]) == number(peak)
    said["## Reward hacking"] = [
        f"from {proxy[20]:.1f} to {proxy[240]:.1f} in 240",
        f"at {number(peak)}, and is {number(quality[240])} at 240",
        f"{number(alone[20])} at 20 iterations, {number(alone[40])} at 40 and {number(alone[120])} at 120"]

    rows, differ = of("table5")
    a = lambda name: number(rows[name]["average"]["mean"])
    said["## Table 5: pooling"] = [
        f"(Eq. 5) reaches {a('attention with query')}, mean {a('mean')}, max {a('max')}, attention without "
        f"query {a('attention without query')}, and eight heads {a('8 heads (released code)')}",
        f"pixel reward of all frames reaches {a('pixels, all frames')}, of the first frame "
        f"{a('pixels, first frame')}"]

    rows, differ = of("table7")
    auc = lambda name: number(sum(rows[name]["auc"]) / 5)
    said["## Table 7: cross-entropy or Bradley-Terry"] = [
        f"AUC is {auc('BCE')} with cross-entropy and {auc('BT')} with",
        f"the difference is {number(differ['BCE in (.2, .4] above BT in (.2, .4]']['difference'])}"]

    rows, differ = of("table8")
    depths = [number(rows[f"K = {k}"]["average"]["mean"]) for k in (1, 2, 4, 6, 8)]
    said["## Table 8: depth"] = [f"Accuracy is {', '.join(depths[:4])} and {depths[4]} with"]

    rows, differ = of("table9")
    balanced = lambda name: number(sum(rows[name]["balanced"]) / 5)
    plain = lambda name: number(rows[name]["average"]["mean"])
    said["## Table 9: other generators"] = [
        f"reaches {balanced('own base')}, on those of three other generators "
        f"{balanced('the other three, mean')}",
        f"The drop is {gap(differ, 'own base above the other three, mean')}",
        f"it reaches {balanced('PRFL-aligned')}",
        f"{plain('own base')} on its own base and {plain('the other three, mean')} on the others",
        f"interval by {gap(differ, 'the other three, mean, in (.8, 1] above in [0, .2]', flip=True)}"]

    rows, differ = of("fig3")
    at_2 = lambda k: number(rows[f"probe, t = 0.2, K = {k}"]["at"]["mean"])
    b = lambda name: number(rows[name]["average"]["mean"])
    said["## Figure 3: where a reward can be read"] = [
        f"reach {at_2(1)} at K = 1, {at_2(6)} at K = 6 and {at_2(8)} at K = 8",
        f"K = 1 by {gap(differ, 'probe, t = 0.2, K = 8 at 0.2 above probe, t = 0.2, K = 1 at 0.2')}",
        f"trained at t = .2 reaches {b('probe, t = 0.2, K = 8')} and one trained at random t reaches "
        f"{b('probe, random t')}",
        f"the model reaches {b('fine-tuned, t = 0.2')}, at random t {b('fine-tuned, random t')}",
        f"one step, reach {b('pixels, all frames')}",
        f"more with t than ours**: the difference is "
        f"{gap(differ, 'swing of pixels, all frames above swing of fine-tuned, random t')}",
        f"the probes are above by {gap(differ, 'pixels, all frames above probe, random t', flip=True)}"]

    rows, differ = of("steady")
    end = "PRFL, steady recipe, at the end"
    best, left = (f"PRFL, paper's recipe, {where}" for where in ("stopped at its best", "at the end"))
    recipes, rates = load("steady")["curves"].values()
    falls = [max(seed.values()) - seed["480"] for seed in recipes["the steady recipe"]]
    look = ", ".join(f"{name} {number(rows[end][name]['mean'])} against "
                     f"{number(rows['clean renders'][name]['mean'])}"
                     for name in ("speed", "brightness", "saturation"))
    at = {rate: number(fmean(seed["240"] for seed in rates[rate])) for rate in ("3e-05", "0.0002", "0.0003")}
    q = lambda row: with_interval(rows[row]["qualified"])
    said["## The steady recipe"] = [
        f"the steady recipe reaches {q(end)}. Clean renders reach {q('clean renders').split()[0]}",
        f"more than {number(max(falls))} below",
        f"ends at {q(left)}", f"the paper's recipe reaches {q(best)}",
        f"above that by {gap(differ, f'{end} above {best}')}", look,
        f"{at['3e-05']} of the validation videos are qualified at 3e-5, {at['0.0002']} at 2e-4, and "
        f"{at['0.0003']} at 3e-4"]

    found = load("search")
    rows, differ, panel, ways = found["rows"], of("search")[1], found["panel"], found["ways"]
    one, end = "one sample", "best of 4 at the end"
    four, chain, most = (f"best of {n} in a chain" for n in (4, 8, 16))
    m = lambda row, plan: number(rows[row][plan]["mean"])
    times = lambda passes: f"{passes / 16:.1f} times"
    other = load("search_float32")
    more = [*rows["steady"][one]["seeds"], *other["rows"]["steady"][one]["seeds"]]
    fell = [max(x.values()) - x["480"]
            for runs in (found, other) for x in runs["validation"]["PRFL, steady recipe"]]
    assert sum(fall <= 0.03 for fall in falls + fell) == 5 and len(falls + fell) == 7
    said["## The steady recipe"] += [
        "end at {}, {}, {} and {} of the test videos".format(*map(number, more)),
        "end {} and {} below their own best".format(*map(number, sorted(fell)[2:])), "falls by more than .03",
        "five runs of seven"]
    guided, name = ways["guided, scale 16"], "PRFL, steady recipe"
    md = (ROOT / "results" / "search.md").read_text()
    bright = re.search(r"^\| guided, scale 64, best of 4 at the end \|.*\| 0(\.\d+) \| [\d.]+ \|$",
                       md, re.M)[1]
    aims = [number(aim, 2) for _, _, aim in AIMS]
    true = lambda plan: number(panel[f"{name}, {plan}"]["adherent"])
    said["## Best of n while sampling"] = [
        f"above the aim of {aims[0]}", f"above the aim of {aims[1]}",
        f"Best of 8 in a chain lifts the untrained base from {m('base', one)} to "
        f"{with_interval(rows['base'][chain])}, for "
        f"{times(found['passes'][chain])}", f"in float32, gave {with_interval(other['rows']['base'][chain])}",
        f"Best of 16 in a chain lifts the base to {with_interval(rows['base'][most])}, for "
        f"{times(found['passes'][most])}",
        f"only lift the base to {number(ways['one sample, 64 steps']['mean'])}",
        f"above best of 4 at the end by {gap(differ, f'base, {chain} above base, {end}')}",
        f"SFT reaches {with_interval(rows['SFT'][chain])}",
        f"gains {gap(differ, f'paper, {chain} above paper, {one}')} from best of 8 and reaches "
        f"{with_interval(rows['paper'][chain])}",
        f"without search, {m('steady', one)}, is above the searched base by "
        f"{gap(differ, f'steady, {one} above base, {chain}')}",
        f"steady recipe cannot be told: the difference is "
        f"{gap(differ, f'steady, {chain} above steady, {one}')}",
        f"Best of 4 has {with_interval(rows['steady'][four])}", f"Best of 16 has {m('steady', most)}",
        f"{true(one)} of its videos are true to the prompt without search, {true(chain)} with best of 8, and "
        f"{true(most)} with",
        gap(differ, f"steady, {end}, by another seed's reward above steady, {end}"),
        f"lifts the base to {with_interval(guided)}.",
        f"lifts best of 4 by {gap(differ, f'base, guided, scale 16, {end} above base, {end}')}",
        f"costs {times(guided['passes'])} the passes. With about as many passes, best of 4 without guidance "
        "reaches "
        f"{m('base', four)}",
        f"falls by {gap(differ, f'base, guided, scale 64, {end} above base, {end}', flip=True)}, and "
        f"brightness is {bright} where "
        f"clean renders have {number(panel['clean renders']['brightness'])}"]

    parts, coarse, passes, elsewhere, more = load("why")["curves"].values()
    end_at = lambda group, row: number(group[row][0][max(group[row][0], key=int)])
    at = lambda group, row, step: number(group[row][0][str(step)])
    exact, four = (f"step per {{}}, {how}, {{}}" for how in ("every step", "at most 4 passes"))
    paper, steady = list(parts)[0], list(parts)[-1]
    log, video = "-log sigmoid", "step per video, at most 4 passes, linear"
    clips = "no rollout: curated clips noised"
    said["## Why the steady recipe does not collapse"] = [
        "up to .04 apart", "The paper's recipe ends at {}. - One change to it is enough: with -log sigmoid "
        "it ends at {}, with coarse rollouts at {}, and with both at {}".format(*(
            end_at(parts, row) for row in (
            paper, exact.format("batch", log), four.format("batch", "linear"), four.format("batch", log)))),
        "As the only change it ends at {}. With coarse rollouts added it ends at {}, with -log sigmoid added "
        "at {}, and with both at {}".format(
            *(end_at(parts, row) for row in (exact.format("video", "linear"), video,
                                             exact.format("video", log), steady))),
        f"After 240 iterations coarse rollouts reach {at(parts, video, 240)}; exact rollouts with noise "
        "of strength .2 (1 - t) reach "
        f"{at(coarse, 'linear, every step, noise .2 (1 - t) on the state', 240)}; coarse rollouts with an "
        f"exact last pass, {at(coarse, 'linear, at most 4 passes and an exact last one', 240)}; curated "
        f"clips with noise in place of a rollout, {at(coarse, f'linear, {clips}', 240)}",
        f"clips with noise end at {end_at(coarse, f'{log}, {clips}')}. They learn more slowly: "
        f"{at(coarse, f'{log}, {clips}', 40)} at 40 iterations, where \"steady, a step for each video\" has "
        f"{at(parts, steady, 40)}",
        "end at {}, {}, {} and {}, and rollouts of every step at {}. At most 4 passes with N = 40 end at "
        "{}".format(*(end_at(passes, row) for row in (
            "at most 1 pass", "at most 2 passes", "at most 4 passes", "at most 8 passes", "every step",
            "at most 4 passes, N = 40"))),
        f"Without SFT updates \"steady, a step for each video\" ends at "
        f"{end_at(elsewhere, 'without SFT updates')}",
        f"after 960 iterations it has {end_at(elsewhere, 'twice as long')}, where its best is "
        f"{number(max(elsewhere['twice as long'][0].values()))}",
        f"Image-to-video ends at {end_at(elsewhere, 'image-to-video')} with \"steady, a step for each "
        f"video\", and at "
        + end_at(elsewhere, "image-to-video, the paper's recipe") + " with the paper's",
        "pull to the base ends at {}, an AdamW for each kind of update at {}, an average of the weights at "
        "{}, gradients clipped to norm .1 at {}, and a reward clipped at 2 at {}".format(*(
            end_at(more, row) for row in (
            "a pull to the base, + (v - v_ref)^2", "an AdamW for each kind of update",
            "an average of the weights, factor .98",
            "gradients clipped to norm .1", "the reward clipped at 2")))]

    rows = load("endurance")["rows"]
    long, steady, spread, longest, paper = (rows[name] for name in (
        "steady, constant 0.0001, mismatched 0.25, 960", "steady, linear 0.0002, mismatched 0.25, 480",
        "steady, linear 0.0002, mismatched 0.25, 960", "steady, linear 0.0002, mismatched 0.25, 1920",
        "paper, constant 0.0001, mismatched 0.25, 480"))
    short, half, fast, fast_480, each, each_480, each_960, plain = (rows[name] for name in (
        "steady, linear 0.0002, mismatched 0.25, 120", "steady, linear 0.0002, mismatched 0.25, 240",
        "steady, linear 0.0003, mismatched 0.25, 120", "steady, linear 0.0003, mismatched 0.25, 480",
        "by video, linear 0.0002, mismatched 0.25, 120",
        "by video, linear 0.0002, mismatched 0.25, 480", "by video, linear 0.0002, mismatched 0.25, 960",
        "steady, linear 0.0002, the paper's reward, 960"))
    falling = rows["paper, linear 0.0001, mismatched 0.25, 960"]
    end = lambda row: with_interval(row["qualified"])
    assert plain["fall"]["difference"] == 0 and each_960["fall"]["interval"][1] < 0
    many = lambda row: ("one seed", "two seeds", "three seeds")[len(row["validation"]["40"]) - 1]
    valid = lambda row, step: number(fmean(row["validation"][step]))
    assert spread["fall"]["difference"] == longest["fall"]["difference"] == 0   # the best quarter
    before = load("steady")["rows"][left]
    own = rows["own moments, constant 0.0001, mismatched 0.25, 480"]
    assert own["qualified"]["interval"][0] > 0.85
    said["## Long runs with mismatched prompts"] = [
        f"With an AdamW of its own for each kind of update it ends at {with_interval(own['qualified'])}, "
        f"with {many(own)}: {', '.join(map(number, own['qualified']['seeds']))}", "above .850, the aim",
        "Whether it reaches .970, the aim",
        f"steady recipe has {with_interval(steady['qualified'])} of the test videos, with {many(steady)}: "
        f"{', '.join(map(number, steady['qualified']['seeds']))}",
        f"renders reach {number(load('steady')['rows']['clean renders']['qualified']['mean'])}",
        f"{valid(steady, '40')} after 40 iterations, {valid(steady, '120')} after 120, "
        f"{valid(steady, '240')} after 240 and {valid(steady, '480')} after 480",
        f"lies {with_interval(steady['fall'], sign='+', key='difference')} from the mean of its best quarter",
        "strict annotator it has {}, by the loose one {}, and in other wordings {}".format(
            *(number(steady["test"][f"{where}"]["mean"])
              for where in ("test, strict", "test, loose", "reworded, firm"))),
        "move at {} frame widths per frame, have brightness {} and saturation {}".format(
            *(number(steady[name]["mean"]) for name in ("speed", "brightness", "saturation"))),
        "With 960 iterations, over which its rate falls to zero, the same recipe has "
        f"{with_interval(spread['qualified'])} of the test videos, with {many(spread)}: "
        f"{', '.join(map(number, spread['qualified']['seeds']))}; the last "
        "quarter of its validations is its best",
        f"With 1,920 iterations it has {with_interval(longest['qualified'])}, with {many(longest)}; the last "
        "quarter of its validations is its best",
        f"{valid(long, '120')} of the validation videos after 120 iterations, {valid(long, '480')} after 480 "
        f"and {valid(long, '960')} after 960, where it has {with_interval(long['qualified'])} of the test "
        f"videos, with {many(long)}",
        f"quarter lies {with_interval(long['fall'], sign='+', key='difference')} from the best quarter",
        f"have {end(short)} of the test videos after 120 iterations and {end(half)} after 240, with "
        f"{many(short)}. If the rate starts at 3e-4, 120 iterations have {end(fast)} and 480 have "
        f"{end(fast_480)}, with {many(fast)}",
        f"{end(each)} of the test videos after 120 iterations, with {many(each)}. After 480 iterations it "
        f"has {end(each_480)}, with {many(each_480)}, and over 960 it falls, with {many(each_960)}: to "
        f"{end(each_960)}, its last quarter {with_interval(each_960['fall'], sign='+', key='difference')} "
        "below its best",
        f"not fall either, with {many(plain)}: after 960 iterations it has {end(plain)}",
        f"{valid(paper, '240')} of the validation videos after 240 iterations and {valid(paper, '480')} "
        f"after 480, with {many(paper)}", f"ends at {with_interval(paper['qualified'])} of the test videos; "
        f"{number(paper['adherent']['mean'])} are adherent and "
        f"{number(paper['deformity_qualified']['mean'])} are not deformed",
        f"with {many(falling)}: it ends at {end(falling)}, its last quarter "
        f"{with_interval(falling['fall'], sign='+', key='difference')} below its best",
        f"ended at {with_interval(before['qualified'])}, with three seeds; "
        f"{number(before['adherent']['mean'])} were adherent and "
        f"{number(before['deformity_qualified']['mean'])} were not deformed"]

    said["## A second size, and image-to-video"] = []
    for name, found in load("elsewhere").items():
        if name not in GENERATORS:
            continue
        rows, differ = found["rows"], {claim["claim"]: claim for claim in found["claims"]}
        q = lambda row: with_interval(rows[row]["qualified"])
        base, lost = number(rows["base"]["qualified"]["mean"]), found["fall"][PAPER]
        assert found["fall"][STEADY]["difference"] == 0         # the last quarter is the best
        verdicts = {claim: found["verdict"] for claim, found in differ.items()}
        lifted = verdicts.pop(f"{STEADY_SEARCHED} above {STEADY}")
        assert set(verdicts.values()) == {"holds"} and (lifted == "holds") == (name == "48x48")
        said["## A second size, and image-to-video"] += [
            f"The base has {base} of the test videos, the paper's recipe {q(PAPER)} and the steady recipe "
            f"{q(STEADY)}." if name == "48x48" else
            f"The base has {base}, the paper's recipe {q(PAPER)} and the steady recipe {q(STEADY)}.",
            f"is above the paper's by {gap(differ, f'{STEADY} above {PAPER}')}: holds. Its last quarter",
            f"the paper's lies {with_interval(lost, sign='+', key='difference')} from its best",
            f"Best of 4 lifts the base to {q(BASE_SEARCHED)}",
            q(STEADY_SEARCHED)]
        if name == "48x48":
            how_fast = lambda row: rows[row]["speed"]["mean"]
            said["## A second size, and image-to-video"] += [
                f"move at {number(how_fast(STEADY))} frame widths per frame, those of the base at "
                f"{number(how_fast('base'))} and clean renders at {number(how_fast('clean renders'))}. Its "
                f"speed is {100 - 100 * how_fast(STEADY) / how_fast('clean renders'):.1f} % below"]

    judged = load("fooled")
    differ = {(where, claim["claim"]): claim for where, found in judged["claims"].items() for claim in found}
    order = [("SFT", "base"), ("paper", "SFT"), ("steady", "paper")]
    assert all(differ[f"test, {who}", f"{a} above {b}"]["verdict"] == "holds"
               for who in ("strict", "loose") for a, b in order)
    assert differ["reworded, firm", "paper above SFT"]["verdict"] == "holds"
    share = lambda where, row: number(judged["rows"][where][row]["mean"])
    steadily = lambda where: with_interval(judged["rows"][where]["steady"])
    md = (ROOT / "results" / "fooled.md").read_text().split("| reworded |")[1]
    right = {row: re.search(rf"^\| {row} \|.*\| 0(\.\d+) \| 0(\.\d+) \|$", md, re.M)
             for row in ("PRFL, steady recipe", "base")}
    of_8, words = "base, best of 8 in a chain", "reworded, firm"
    said["## Is the annotator fooled"] = [
        "times the usual ones, the loose one's 1.25 times", "limits are 0.8",
        "the base has {}, SFT {}, the paper's recipe at its best {}, the steady recipe {}, and clean renders "
        "{}".format(
            *(share("test, strict", row) for row in ("base", "SFT", "paper")), steadily("test, strict"),
            share("test, strict", "clean renders")),
        "they have {}, {}, {}, {} and {}".format(
            *(share("test, loose", row) for row in ("base", "SFT", "paper")), steadily("test, loose"),
            share("test, loose", "clean renders")),
        "the base has {}, SFT {}, the paper's recipe {}, and the steady recipe {}".format(
            *(share(words, row) for row in ("base", "SFT", "paper")), steadily(words)),
        f"cannot be told: the difference is "
        f"{with_interval(differ[words, 'steady above paper'], sign='+', key='difference')}",
        f"{right['PRFL, steady recipe'][1]} of the steady recipe's videos are true to it, and "
        f"{right['base'][1]} of the base's",
        f"{right['PRFL, steady recipe'][2]} of the steady recipe's videos pass, and {right['base'][2]} of "
        f"the base's",
        f"base {share(words, of_8)}, as much as the steady recipe has: the difference is "
        + with_interval(differ[words, f"steady above {of_8}"], sign="+", key="difference")]

    quick, slow = load("speed"), load("speed_float32")
    never = lambda row, level: not any(quick["seconds"][row][level])
    mean = lambda found, row, level: round(fmean(found["seconds"][f"PRFL, {row} recipe"][level]))
    top = lambda row: number(max(rate for seed in quick["curves"][row] for _, rate in seed))
    flops = {row: f"{value / 1e15:.1f}" for row, value in quick["flops"].items()}
    assert never("PRFL, paper's recipe", "0.9")
    assert all(never(row, "0.8") for row in quick["seconds"] if "PRFL" not in row)
    refl = {(frames, recipe): f"RGB ReFL, {frames}, {recipe} recipe"
            for frames in ("all frames", "first frame")
            for recipe in ("paper's", "steady")}
    said["## Quality over time"] = [
        "reaches .85 of the validation videos after {} CPU seconds, .90 after {}, and .95 after {}".format(
            *(mean(quick, "steady", level) for level in ("0.85", "0.9", "0.95"))),
        f"""reaches .85 after {mean(quick, "paper's", '0.85')} CPU seconds and never reaches .90""",
        "to reach .90 in a third", "SFT and RGB ReFL never reach .80",
        f"""reaches .90 after {mean(slow, 'steady', '0.9')} CPU seconds and the paper's after """
        f"""{mean(slow, "paper's", '0.9')}. """
        f"The ratio is {number(slow['ratio_at_.90'], 2)}",
        f"""reaches {top(refl['all frames', "paper's"])} with all frames and """
        f"""{top(refl['first frame', "paper's"])} with the """
        "first frame. With coarse rollouts and the saturating loss it reaches "
        f"{top(refl['all frames', 'steady'])} and {top(refl['first frame', 'steady'])}",
        f"{flops['PRFL, steady recipe']} PFLOPs with the steady recipe and " + flops["PRFL, paper's recipe"],
        f"takes {flops[refl['first frame', 'steady']]} PFLOPs with the steady recipe and "
        + flops[refl["first frame", "paper's"]]]
    assert slow["ratio_at_.90"] < 1 / 3

    trials = load("rivals")["trials"]
    prfl, *others = trials
    best = {method: max((trial for trial in others if f"--method {method} " in trial["flags"] + " "),
                        key=lambda trial: trial["best"]["mean"]) for method in ("nft", "grpo")}
    tried = lambda flags: next(trial for trial in others if trial["flags"] == flags)
    rate = lambda trial, step: number(trial["rates"][step])
    spent = lambda trial, step: f"{trial['spent'][step]:.0f} CPU seconds"
    step_of_best = lambda trial: max(trial["rates"], key=trial["rates"].get)
    without = tried("--method nft --rollout_passes 8 --no-sft_updates --inner_updates 4 --advantage_clip 1 "
                    "--learning_rate 3e-4")
    with_sft = tried("--method nft --rollout_passes 8 --inner_updates 4 --learning_rate 3e-4 "
                     "--advantage_clip 1")
    four_steps = tried("--method grpo --rollout_passes 8 --no-sft_updates --inner_updates 4 "
                       "--learning_rate 3e-4")
    one_step = tried("--method grpo --rollout_passes 8 --no-sft_updates --inner_updates 1 "
                     "--learning_rate 3e-4 --kl_weight 0")
    said["## Rivals with the same reward"] = [
        f"The first points are about the {len(others)} runs",
        f"the base has {with_interval(load('rivals')['base'])}",
        f"has {rate(prfl, '40')} after {spent(prfl, '40')} and {with_interval(prfl['best'])} after "
        f"{spent(prfl, '120')}",
        *(f"best run of {name} has {with_interval(best[key]['best'])} after "
          f"{spent(best[key], step_of_best(best[key]))}" for key, name in (("nft", "DiffusionNFT"),
                                                                         ("grpo", "Flow-GRPO"))),
        f"{rate(without, '20')} after {spent(without, '20')}, and then",
        f"it reaches {rate(four_steps, '60')} after {spent(four_steps, '60')}",
        *(f"above {name} by {with_interval(best[key]['prfl_above'], sign='+')}"
          for key, name in (("nft", "DiffusionNFT"), ("grpo", "Flow-GRPO"))),
        f"{rate(with_sft, '40')} with SFT updates and {rate(without, '40')} without",
        f"from {rate(one_step, '50')} after 50 iterations to {rate(one_step, '100')} after 100",
        f"rewards of its samples rise to {one_step['reward']['100']:.1f}"]
    found = load("rivals")
    longer, at_best = found["rows"], {claim["claim"]: claim for claim in found["claims"]}
    tuned = ("PRFL, steady recipe", "DiffusionNFT", "Flow-GRPO", "SFT")
    assert {len(longer[name]["best"]) for name in tuned} == {3}
    more = ("DiffusionNFT, falling rate", "LeapAlign", "Direct-Align")
    assert {len(longer[name]["best"]) for name in more} == {3}
    at = lambda name: number(fmean(longer[name]["best"]))
    ends = lambda name: with_interval(longer[name]["qualified"])
    said["## Rivals with the same reward"] += [
        f"the best validations of DiffusionNFT have {at('DiffusionNFT')}, and its runs end at "
        f"{ends('DiffusionNFT')}",
        f"The best validations of Flow-GRPO have {at('Flow-GRPO')}, and its runs end at {ends('Flow-GRPO')}",
        "PRFL takes {:.0f} CPU seconds on one machine that does nothing else, one of SFT {:.0f}, of "
        "DiffusionNFT {:.0f} and of Flow-GRPO {:.0f}".format(*(
            longer[name]["cpu_seconds"][0] for name in ("PRFL, steady recipe", "SFT", "DiffusionNFT",
                                                        "Flow-GRPO"))),
        f"SFT ends at {ends('SFT')} and PRFL at {ends('PRFL, steady recipe')}",
        "Each at its best validation, PRFL is above DiffusionNFT by {} and above Flow-GRPO by {}".format(*(
            with_interval(at_best[f"each at its best validation, PRFL above {name}"], sign="+",
                          key="difference") for name in ("DiffusionNFT", "Flow-GRPO"))),
        "with three seeds: the best validations of DiffusionNFT with a falling rate have "
        f"{at(more[0])}, and it ends at {ends(more[0])}",
        f"LeapAlign has {at('LeapAlign')} and ends at {ends('LeapAlign')}, and Direct-Align has "
        f"{at('Direct-Align')} and ends at {ends('Direct-Align')}",
        "PRFL is above them by {}, {} and {}: all hold".format(*(
            with_interval(at_best[f"each at its best validation, PRFL above {name}"], sign="+",
                          key="difference") for name in more))]
    assert all(at_best[f"each at its best validation, PRFL above {name}"]["verdict"] == "holds"
               for name in more)
    assert min(best[key]["best"]["interval"][0] for key in best) > load("rivals")["base"]["interval"][1]
    assert min(best[key]["prfl_above"]["interval"][0] for key in best) > 0

    lost = {key: number(max(one[key] for one in load("stopping")["found"].values()))
            for key in ("lost", "lost_by_opinion", "lost_at_end")}
    said["## Stopping without an annotator"] = [f"up to {lost['lost_by_opinion']} worse",
                                                f"within {lost['lost']} of",
                                                f"loses up to {lost['lost_at_end']}"]
    judged = sorted(load("endurance")["judge"].values(), key=lambda run: run["lost"])
    assert len(judged) == 3 and all(run["score"] == run["opinion"] for run in judged)
    lost, never = ([number(run[key]) for run in judged] for key in ("lost", "lost_at_end"))
    said["## Stopping without an annotator"] += [
        f"choice lost {lost[0]}", f"best and lost {lost[1]} and {lost[2]}, where never stopping loses "
        f"{never[1]} and {never[2]}"]

    two, differ = load("wan22")["two experts"]["rows"], {
        claim["claim"]: claim for part in ("two experts", "pinned frame")
        for claim in load("wan22")[part]["claims"]}
    rate = lambda row, rows=two: with_interval(rows[row]["qualified"])
    start, low, high = wan22.START, wan22.LOW, wan22.HIGH
    for name in ("gain of the low-noise one alone above half of the gain of both",
                 f"{wan22.EVERY_STEP} above {low}"):
        assert differ[name]["verdict"] == "does not hold"
    assert min(claim["interval"][0] for name, claim in differ.items() if name in (
        f"{high} above {low}", f"{wan22.BOTH} above {wan22.ONE}", "PRFL above SFT")) > 0
    pinned = load("wan22")["pinned frame"]["rows"]
    said["## Two experts, and a pinned first frame"] = [
        f"The base has {number(two['base']['qualified']['mean'])}, and the two experts begin at "
        f"{rate(start)}",
        f"on the low-noise expert reaches {rate(low)}, on the high-noise expert {rate(high)}, and on both "
        f"{rate(wan22.BOTH)}", f"one by {gap(differ, f'{high} above {low}')}: holds",
        f"alone cannot be told: {gap(differ, f'{wan22.BOTH} above {high}')}",
        f"half the size, reaches {rate(wan22.ONE)}. Both experts are above it by "
        f"{gap(differ, f'{wan22.BOTH} above {wan22.ONE}')}: holds",
        "When its rollouts make every step, and not at most four long ones, it reaches "
        f"{rate(wan22.EVERY_STEP)}, which is lower",
        f"base has {rate('base', pinned)}",
        f"SFT reaches {rate('SFT', pinned)}, PRFL {rate('PRFL', pinned)}",
        f"above SFT by {gap(differ, 'PRFL above SFT')}: holds"]

    fig5 = load("fig5")
    share = lambda row, what: f"{fig5[row][what]['mean']:.0%}".replace("%", " %")
    said["## Figure 5: video by video"] = [
        f"Against RWR, PRFL wins {share('RWR', 'win')} and loses {share('RWR', 'lose')}",
        f"Against SFT it wins {share('SFT', 'win')} and loses {share('SFT', 'lose')}",
        f"first frame it wins {share('RGB ReFL, first frame', 'win')} and loses "
        f"{share('RGB ReFL, first frame', 'lose')}, with all "
        f"frames {share('RGB ReFL, all frames', 'win')} and {share('RGB ReFL, all frames', 'lose')}"]

    rows, _ = of("labels")
    c = lambda n: number(rows[f"{n} samples"]["average"]["mean"])
    said["## Label count"] = [f"Accuracy is {c(1024)} from 1,024 own samples, {c(4096)} from 4,096 and "
                              f"{c(16384)} from 16,384"]
    for row in (row for name, row in load("few_labels")["rows"].items() if name.startswith("0.25 ")):
        said["## Label count"] += [
            f"With {row['labels']:,} labels the reward model judges {number(fmean(row['reward_accuracy']))} "
            "of the held-out finished videos correctly, and the generator ends at "
            f"{with_interval(row['qualified'])} of the test videos, with {many(row)}",
            f"it has {valid(row, '120')} after 120 iterations and {valid(row, '480')} after 480"]

    fewest = load("few_labels")["rows"]["0.25 mismatched, 1 of 320"]
    by_seed = [number(rate) for rate in fewest["qualified"]["seeds"]]
    said["## Label count"] += [
        f"by seed it ends at {by_seed[0]}, {by_seed[1]} and {by_seed[2]}, where the base has "
        f"{number(load('table1')['rows']['base']['qualified']['mean'])}. Its videos are slower, "
        f"{number(fewest['speed']['mean'])}, and brighter, {number(fewest['brightness']['mean'])}"]
    plain = load("few_labels")["rows"]["0 mismatched, 1 of 1"]
    said["## Label count"] += [
        f"Without mismatched prompts, and with {plain['labels']:,} labels, the generator ends at "
        f"{with_interval(plain['qualified'])}, with {many(plain)}"]

    found = load("second_round")
    rows, differ = found["rows"], {claim["claim"]: claim for claim in found["claims"]}
    first, more, other = rows                                   # in the order of study/second_round.py
    assert {claim["verdict"] for claim in differ.values()} == {"cannot be told"}
    said["## A second round of labels"] = [
        f"{many(rows[first])}",
        f"With the first round, {rows[first]['labelled']:.0f} labels, the generator ends at "
        f"{with_interval(rows[first]['qualified'])}",
        f"With {rows[more]['labelled']:,.0f} labels of the base it ends at "
        f"{with_interval(rows[more]['qualified'])}",
        f"With {rows[other]['labelled']:,.0f}, the first {rows[first]['labelled']:.0f} of the base and the "
        f"others of the aligned generator, it ends at {with_interval(rows[other]['qualified'])}",
        f"the difference is {gap(differ, f'{other} above {more}')}",
        f"the differences are {gap(differ, f'{more} above {first}')} and "
        f"{gap(differ, f'{other} above {first}')}"]

    found, aligned = load("search_mismatched"), "PRFL, steady, 480 iterations"
    rows, differ = found["rows"], {claim["claim"]: claim for claim in found["claims"]}
    chain = lambda row, n: with_interval(rows[f"{row}, best of {n} in a chain"])
    resampled = lambda row, n: with_interval(rows[f"{row}, best of {n} resampled"])
    lifts = differ[f"{aligned}, best of 2 resampled above {aligned}, one sample"]
    better = differ["base, best of 4 resampled above base, best of 8 in a chain"]
    instead = differ[f"{BASE_165}, best of 4 resampled above {STEADY_165}, one sample"]
    assert lifts["verdict"] == better["verdict"] == instead["verdict"] == "holds"
    said["## Best of n by rewards that read their prompt"] = [
        f"lifts the untrained base from {number(rows['base, one sample']['mean'])} to {resampled('base', 2)} "
        f"with 2 candidates",
        f"to {resampled('base', 4)} with 4", f"to {resampled('base', 8)} with 8",
        f"best of 8 in a chain reaches {chain('base', 8)}", f"best of 16 in a chain {chain('base', 16)}",
        f"4 candidates that are resampled are above 8 in a chain by "
        f"{with_interval(better, sign='+', key='difference')}: holds. 3 are so too, by "
        f"{gap(differ, 'base, best of 3 resampled above base, best of 8 in a chain')}",
        f"above the steady recipe with one sample by "
        f"{gap(differ, f'base, best of 4 resampled above {aligned}, one sample')}: holds",
        f"has {with_interval(rows[f'{aligned}, one sample'])} alone, {resampled(aligned, 2)} with 2 "
        f"candidates that are resampled",
        f"{chain(aligned, 4)} with best of 4 in a chain and {chain(aligned, 8)} with best of 8 in a "
        "chain",
        f"lifts it by {with_interval(lifts, sign='+', key='difference')}: holds",
        f"the base has {resampled(BASE_165, 2)} with 2 candidates, {resampled(BASE_165, 4)} with 4 and "
        f"{resampled(BASE_165, 8)} with 8, and the generator that was aligned by the same reward model has "
        f"{with_interval(rows[f'{STEADY_165}, one sample'])} with one sample",
        f"is above it by {with_interval(instead, sign='+', key='difference')}: holds",
        f"has {resampled(STEADY_165, 4)} with 4 candidates and {resampled(STEADY_165, 8)} with 8"]

    judge = load("annotator")
    said["## The annotator"] = [
        f"{100 * judge['clean_pass']:.2f} % of 2,000 clean clips pass",
        f"clips {100 * judge['flawed_fail']:.1f} % fail",
        f"jitter, {number(judge['fails']['jitter'])}, and reversal, {number(judge['fails']['reversal'])}"]
    least = sorted(judge["fails"], key=judge["fails"].get)[:2]
    assert least == ["jitter", "reversal"]
    return said


def test_the_walk_says_what_labels_brought():
    few, table = load("few_labels")["rows"], load("table1")["rows"]
    least, some, every = (few[f"0.25 mismatched, 1 of {n}"] for n in (80, 20, 1))
    rate = lambda row: number(row["qualified"]["mean"])
    said = (f"the base makes {rate(table['base'])} of the test videos well (good motion, form and prompt), "
            f"and SFT, which needs no label, {rate(table['SFT, equal time'])}. Aligned by a reward model of "
            f"{least['labels']} labels it makes {rate(least)} well, by one of {some['labels']} labels "
            f"{rate(some)}, and by one of all {every['labels']:,} labels {rate(every)} (with three "
            "seeds each;")
    assert [len(row["validation"]["40"]) for row in (least, some, every)] == [3, 3, 3]
    searched = load("search_mismatched")["rows"][f"{BASE_165}, best of 4 resampled"]
    walk = " ".join((ROOT / "docs/your_model.md").read_text().split())
    assert said in walk and f"makes {rate(searched)} well" in walk


# What is no result: settings and intervals of t.
SETTINGS = re.compile(r"\bt = \.\d|\(\.2, \.4\]|[Ll]ambda 0?\.1|Wan2\.1|\.040 of the width|from \.030|"
                      r"95 %|1\.3B|Python 3\.11")
# PRFL's share of qualified videos in four runs of `make demo`, which writes no file to results/.
DEMOS = (".926", ".941", ".930", ".906")


@pytest.mark.parametrize("title", list(claims()))
def test_figures_are_those_of_the_results_and_none_is_left_out(title):
    text = section("docs/results.md", title)
    for claim in claims()[title]:
        assert claim in text, f"{title}: results/ now says {claim!r}"
        text = text.replace(claim, "", 1)
    assert not FIGURE.findall(SETTINGS.sub("", text)), f"{title}: a figure that no results file vouches for"


def test_no_figure_stands_elsewhere():
    """Sections of docs/results.md without a results file, and the README outside of its tables."""
    text = (ROOT / "docs" / "results.md").read_text()
    for title in re.findall(r"^## .*", text, re.M):
        if title not in claims():
            assert not FIGURE.findall(SETTINGS.sub("", section("docs/results.md", title))), title
    text = (ROOT / "README.md").read_text()
    steady = load("endurance")["rows"]["steady, linear 0.0002, mismatched 0.25, 480"]
    # the table is from the last of the four
    assert f"\n| PRFL, the steady recipe, 160 iterations | {DEMOS[-1]} [" in text
    readme = re.sub(r"^\|[^\n]*\|$|^```.*?^```$|arXiv \d+\.\d+", "", text, flags=re.M | re.S)
    readme = " ".join(readme.split("\n## Differences")[0].split())
    searched = load("search_mismatched")["rows"]
    two, four = (searched[f"base, best of {n} resampled"]["passes"] / 16 for n in (2, 4))
    for said in (f"takes {two:.1f} times as many forward passes with 2 candidates and {four:.1f} times "
                 "with 4.",
                 f"gave PRFL {DEMOS[0]}, {DEMOS[1]}, {DEMOS[2]} and {DEMOS[3]}.",
                 f"480 iterations, which gives the {number(steady['qualified']['mean'])} in the table below"):
        assert said in readme, said
        readme = readme.replace(said, "", 1)
    assert not FIGURE.findall(SETTINGS.sub("", readme))


def test_verdicts_are_those_of_the_results():
    """What the README calls not held is what results/ calls so, and the other way round."""
    readme = section("README.md", "## Results")
    failed = {name: any(claim["paper"] == "yes" and claim["verdict"] == "does not hold"
                        for claim in load(name)["claims"])
              for name in ("table1", "table2", "table3", "table5", "table7", "table8", "table9", "fig3",
                           "loss")}
    for name, failing in failed.items():
        title = name.replace("table", "table ").replace("fig", "figure ")
        title = title.replace("loss", "reward hacking, loss")
        row = re.search(rf"\| {title}[^|]* \| ([^|]*) \|", readme)[1]
        assert failing == ("**" in row), f"{name}: {row}"


def test_the_hours_of_all_pages():
    pages = [json.loads(path.read_text()) for path in (ROOT / "results").glob("*.json")]
    minutes = sum(page["provenance"].get("minutes_of_parts") or 0 for page in pages if "provenance" in page)
    minutes += sum(sum(row["minutes"]) for row in load("endurance")["rows"].values())
    assert f"add up to {minutes / 60:.0f} hours" in section("docs/results.md", "## How long it takes")


def all_claims(found):
    """Every claim in the value of a results file, however deep it stands."""
    if isinstance(found, dict) and "verdict" in found:
        return [found]
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [claim for value in inner for claim in all_claims(value)]


def test_how_many_verdicts_a_stricter_test_would_leave_open():
    """A t interval over the three seeds, where the verdict's interval is from seeds and videos together."""
    t, loose = 4.303, []                                        # two degrees of freedom, 95 %
    for path in sorted((ROOT / "results").glob("*.json")):
        for claim in all_claims(json.loads(path.read_text())):
            if len(claim.get("seeds", ())) == 3 and claim["verdict"] != "cannot be told":
                half = t * stdev(claim["seeds"]) / 3 ** 0.5
                if abs(fmean(claim["seeds"])) <= half:
                    loose.append((path.stem, claim["claim"]))
    words = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen".split()
    said = words[len(loose)]
    text = section("docs/results.md", "## What three seeds can tell")
    assert f"Under it {said} verdicts would become" in text, loose
    assert f"names {said} verdicts that a stricter test" in section("README.md", "## Results")


def test_memory_is_the_planners():
    """What README.md and docs/your_model.md say that alignment takes of a GPU, and what the walk's judge adds
    (docs/scale.md)."""
    def costs(preset, gpus, **flags):
        return plan.costs(plan.Config(preset, gpus=gpus, **flags), plan.GENERATORS[preset])

    gb = lambda *args, **flags: costs(*args, **flags)["with"]["peak"] / 1e9
    small, large, ti2v, a14b = "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b", "wan2.2-a14b"
    pages = {page: " ".join((ROOT / page).read_text().split()) for page in PAGES}
    assert (f"alignment of all weights takes {gb(small, 1):.0f} GB of one GPU for Wan2.1 1.3B, "
            f"{gb(large, 8):.0f} GB of each of eight for 14B, {gb(ti2v, 2):.0f} GB of each of two for "
            f"TI2V-5B, and {gb(a14b, 8):.0f} GB of each of eight for one of A14B's two experts"
            ) in pages["README.md"]
    assert gb(ti2v, 1) == gb(ti2v, 8, parallel="ddp") > 80 and gb(a14b, 8, expert="high") == gb(a14b, 8)
    for said in (f"takes {gb(ti2v, 1):.2f} GB, which fits neither one GPU of 80 GB nor several with ddp. "
                 f"With fsdp it takes {gb(ti2v, 2):.2f} GB of each of two GPUs, or {gb(ti2v, 8):.2f} GB of "
                 "each of eight. With `--lora_rank 16` it takes "
                 f"{gb(ti2v, 1, lora_rank=16):.2f} GB of one GPU",
                 f"`low` and `high` take {gb(a14b, 8):.2f} GB of each of eight GPUs, and `both` "
                 f"{gb(a14b, 8, expert='both'):.2f} GB, or "
                 f"{gb(a14b, 8, expert='both', offload_activations=True):.2f} GB with"):
        assert said in pages["docs/your_model.md"], said
    host = lambda kind: costs(a14b, 8, method="sample", parallel=kind)["host"] / 1e9
    assert (f"with A14B eight processes take {host('ddp'):.0f} GB of the host memory of a node. With "
            f"`--parallel fsdp` they take {host('fsdp'):.0f} GB") in pages["docs/scale.md"]
    of_judge = lambda *args: f"{costs(*args)['reward_weights'] / 1e9:.2f} GB more of "
    assert (f"takes {of_judge(small, 1)}one GPU for 1.3B and {of_judge(large, 8)}each of eight for 14B"
            in pages["docs/scale.md"])


# ---- files, commands, flags
def commands(page):
    """The commands of a page's bash blocks, and of its inline code that starts with python -> [[words]]"""
    text = (ROOT / page).read_text()
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    blocks = blocks.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    inline = re.findall(r"`(python [^`]+)`", " ".join(prose.split()))
    found = [shlex.split(line, comments=True) for line in (*blocks, *inline)]
    return [words for words in found if words]


def configs(words):
    """-> (the script's Config classes, the words behind its name), or None if the command is none of ours"""
    if "torchrun" in words[0]:
        of_torchrun = ("--nproc_per_node", "--nnodes", "--rdzv")
        words = ["python", *(word for word in words[1:] if not word.startswith(of_torchrun))]
    if words[0] != "python":
        return None
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    if words[1] == "-m" and name == "pytest":
        return None
    module = importlib.import_module(name)
    if hasattr(module, "COMMANDS") and rest and rest[0] in module.COMMANDS:
        return (module.COMMANDS[rest[0]][1],), rest[1:]
    classes = [value for value in vars(module).values() if isinstance(value, type)
               and dataclasses.is_dataclass(value) and value.__module__ == module.__name__]
    return classes, rest


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_and_take_these_flags(page):
    if "label.py" in (ROOT / page).read_text():
        pytest.importorskip("flask", reason="label.py is an extra")
    for words in commands(page):
        found = configs(words)
        if found:
            classes, rest = found
            known = {f"--{name}" for one in classes for field in dataclasses.fields(one)
                     for name in (field.name, f"no-{field.name}", field.metadata.get("alias"))}
            unknown = [word for word in rest if word.startswith("--") and word not in known]
            assert not unknown, f"{page}: {' '.join(words)}: no such flags: {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"
    named = re.findall(r"`((?!results/NAME|runs/)(?:[\w.-]+/)*[\w-]+\.(?:py|md|toml)|"
                       r"requirements[\w-]*\.txt)`", text)
    named += [word for words in commands(page) for word in words
              if re.fullmatch(r"(?:[\w-]+/)*(?:\w+\.py|requirements[\w-]*\.txt)", word)]
    for path in named:
        assert (ROOT / path).exists(), f"{page} names {path}"
    for folder in re.findall(r"`((?:world|formats|scale|study|docs|tests)/)`", text):
        assert (ROOT / folder).is_dir()


# ---- the walk of docs/your_model.md
SIZE_FLAGS = ("--size", "--frames", "--fps", "--num_inference_steps", "--depth", "--holdout",
              "--max_train_steps", "--batch_size", "--gradient_accumulation_steps", "--mixed_precision",
              "--num_validation", "--validation_steps",
              "--checkpointing_steps")
FIRST_COMMENT = {"1.3B": "# 1.3B, one GPU\n", "14B": "# 14B, eight GPUs\n"}


def without_sizes(words, more=()):
    """The words of a command without flags of size and speed, and their values."""
    kept, skipping = [], False
    for word in words:
        skipping = word in (*SIZE_FLAGS, *more) or skipping and not word.startswith("--")
        if not skipping:
            kept.append(word)
    return kept


def walk(model):
    """docs/your_model.md's commands for the model -> [[script, words]], each started by plain python."""
    text, found = (ROOT / "docs/your_model.md").read_text(), []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
        if any(block.startswith(comment) for name, comment in FIRST_COMMENT.items() if name != model):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "torchrun":
                assert words[1] == "--nproc_per_node=8"
                words[:2] = ["python"]
            if words and words[0] == "python":
                found.append(words[1:])
    return found


def make_own():
    """The commands of `make own-Wan2.1` -> [[script, words]], without those of tests/own.py that only
    prepare."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    values = dict(re.findall(r"^(\w+) := (.*)$", text, re.M)) | {"RUN": "python"}
    recipe = re.search(r"^own-Wan2.1: .*\n((?:\t.*\n)+)", text, re.M)[1]
    while "$(" in recipe:
        recipe = re.sub(r"\$\((\w+)\)", lambda name: values[name[1]], recipe)
    found = []
    for line in recipe.splitlines():
        words = shlex.split(line.replace("../../tests/own.py answer", "").replace("../../", ""))
        if words[0] == "python":
            found.append(words[1:])
    return found


def test_both_models_walk_the_same_way():
    one, eight = ([without_sizes(words, ["--parallel"]) for words in walk(model)] for model in FIRST_COMMENT)
    assert one == eight and len(one) > 20
    trainings = [words for words in walk("14B") if words[0].startswith("train_")]
    assert len(trainings) == 7
    assert all(words[words.index("--parallel") + 1] == "fsdp" for words in trainings)


def test_make_own_walks_this_way():
    """The same words in the same order, but for sizes."""
    assert [without_sizes(words) for words in make_own()] == [without_sizes(words) for words in walk("1.3B")]


def test_the_walk_restates_no_default():
    """No flag of the walk has its default, but for --output_dir, which names a folder that comes up again."""
    for model, config in (("1.3B", "wan2.1-t2v-1.3b"), ("14B", "wan2.1-t2v-14b")):
        for words in walk(model):
            classes, rest = configs(["python", *words])
            defaults = {field.name: field.default for one in classes for field in dataclasses.fields(one)}
            stage = words[0].removeprefix("train_").removesuffix(".py")
            if stage in ("align", "reward"):
                defaults |= families.training_defaults(PRESETS[config] | {"image_dim": None}, stage)
            for flag, value in zip(rest, rest[1:]):
                if flag.startswith("--") and flag != "--output_dir":
                    assert str(defaults[flag[2:]]) != value, f"{' '.join(words)}: {flag} restates its default"
