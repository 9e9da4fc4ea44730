"""study/elsewhere.py: the commands of its parts, and its table."""
import json

from test_endurance import work_in

from study import elsewhere, parts

SHARE = {elsewhere.BASE: 300, elsewhere.BASE_SEARCHED: 400, elsewhere.PAPER: 320, elsewhere.STEADY: 480,
         elsewhere.STEADY_SEARCHED: 481, elsewhere.CLEAN: 510}


def test_the_parts_and_the_table(tmp_path, monkeypatch):
    """The annotator finds SHARE of 512 videos qualified; the steady recipe ends .01 below its best."""
    work, made = work_in(tmp_path, preset="full", seeds=1), {}
    columns = ("physical_qualified", "deformity_qualified", "adherent", "speed", "brightness", "saturation")

    def run(self, wanted):
        for folder, last, *words in wanted:
            made[folder.name] = " ".join(map(str, words)).replace(f"{work.folder}/seed-0/", "")
            (folder / last).parent.mkdir(parents=True, exist_ok=True)
            (folder / last).write_text("{}")
            if last == "per_video.json":
                rows = {"one": (elsewhere.BASE, elsewhere.PAPER, elsewhere.STEADY),
                        "best-of-4": (elsewhere.BASE_SEARCHED,),
                        "best-of-2": (elsewhere.STEADY_SEARCHED,)}
                asked = next(rows[name] for name in rows if f"evaluation-{name}-" in folder.name)
                named = {f"g{i}": row for i, row in enumerate(asked)} | {elsewhere.CLEAN: elsewhere.CLEAN}
                (folder / last).write_text(json.dumps({
                    short: dict.fromkeys(columns, [0.5] * 512) | {
                        "qualified": [float(i < SHARE[row]) for i in range(512)]}
                    for short, row in named.items()}))
            elif last == "transformer/config.json":
                best = 0.97 if "elsewhere-steady" in folder.name else 0.9
                rates = {40 * i: best for i in range(1, 12)} | {480: best - 0.03}
                (folder / "metrics.jsonl").write_text("".join(
                    json.dumps({"step": step, "validation_qualified": rate}) + "\n"
                    for step, rate in rates.items()))

    monkeypatch.setattr(parts.Work, "run", run)
    elsewhere.elsewhere(work)
    assert len(made) == 2 * (1 + 2 + 3)             # of each generator: reward model, recipes, evaluations
    assert made["reward-mismatched-0.25-world-mid"].endswith("--mismatched 0.25 --world mid")
    steady = made["elsewhere-steady-task-i2v"]
    assert steady.startswith("train_align.py --recipe steady --seed 0 --task i2v --curated_dir "
                             "curated-task-i2v --reward reward-mismatched-0.25-task-i2v/reward "
                             "--max_train_steps 480")
    assert "--learning_rate" not in steady and "--lr_scheduler" not in steady       # the recipe's defaults
    searched = made["elsewhere-evaluation-best-of-2-world-mid"]
    assert "g0=elsewhere-steady-world-mid " in searched and searched.endswith("--best_of 2")
    assert "--search" not in searched and "--best_of" not in made["elsewhere-evaluation-one-task-i2v"]

    found = json.loads((tmp_path / "results/elsewhere.json").read_text())
    for name in elsewhere.GENERATORS:
        rows = found[name]["rows"]
        assert {row: cell["qualified"]["mean"] * 512 for row, cell in rows.items()} == SHARE
        verdicts = [claim["verdict"] for claim in found[name]["claims"]]
        assert verdicts == ["holds", "holds", "holds", "cannot be told"]
        assert abs(found[name]["fall"][elsewhere.STEADY]["difference"] + 0.01) < 1e-9
    text = (tmp_path / "results/elsewhere.md").read_text()
    assert "the steady recipe -0.010 [" in text and "## image-to-video" in text
