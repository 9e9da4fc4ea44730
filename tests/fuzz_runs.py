"""Run folders in any half-made state, for tests/fuzz.py: what kills, power losses, disks and hands leave
behind.

A case takes a run of two steps apart at random and starts a run in its folder. It must end with exit code 0,
or with 1 or 2 and one line; a refused run changes nothing; and no checkpoint is lost, whatever the run did to
the folder."""
import shutil

LEFT = ("transformer.tmp77", "transformer.replaced", "best.tmp", "best.replaced", "best", "sharded_state.tmp",
        "samples", "checkpoint-000004.tmp", "earlier-1795000000000000000-checkpoint-000009",
        "earlier-20200101-000000")


def all_files(out):
    """{path: bytes} below a run folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def take_apart(out, rng):
    """One thing that can happen to a run folder."""
    kind, there = rng.randrange(8), sorted(path for path in out.iterdir() if path.name != ".lock")
    one = rng.choice(there) if there else None
    files = sorted(path for path in out.rglob("*") if path.is_file())
    if kind == 0 and one:                                       # removed by hand
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    elif kind == 1 and files:                                   # a power loss: content that was not flushed
        rng.choice(files).write_bytes(b"")
    elif kind == 2:                             # a kill while it was written, or an older version's leftovers
        name, file = out / rng.choice(LEFT), rng.choice(("w", "best.json", "args.json"))
        text = rng.choice(("", "{}", '{"step": 1}'))
        if not name.is_file():                                  # kind 5 may have made it one
            name.mkdir(exist_ok=True)
            (name / file).write_text(text)
    elif kind == 3:                                      # a kill while the run was set aside, or brought back
        half = out / f"earlier-20260101-00000{rng.randrange(3)}{rng.choice(('.moving', ''))}"
        half.mkdir(exist_ok=True)
        for path in there:
            if rng.random() < 0.5 and not path.name.startswith("earlier-"):
                path.rename(half / path.name)
    elif kind == 4 and (out / "checkpoint-000002").is_dir():    # a kill while a checkpoint was replaced
        name = out / f"checkpoint-00000{rng.choice('2345')}{rng.choice(('.replaced', '.old', '.tmp', ''))}"
        if not name.exists():
            shutil.copytree(out / "checkpoint-000002", name)
            if rng.random() < 0.5:
                shutil.rmtree(out / "checkpoint-000002")
    elif kind == 5:                                 # a folder where a file should be, and the other way round
        name = out / rng.choice(("args.json", "metrics.jsonl", "checkpoint-000007", "best", "earlier-x",
                                 "report.json"))
        if not name.exists():
            name.touch() if rng.random() < 0.5 else name.mkdir()
    elif kind == 6:
        (out / ".lock").write_text(rng.choice(("", "1 on here\nrun\n", "1 on here\nshards\n")))
    elif kind == 7 and one:                                     # copied by hand
        name = out / f"copy-of-{one.name}"
        if not name.exists():
            shutil.copytree(one, name) if one.is_dir() else shutil.copy(one, name)


def half_made(folder, rng, judge, train):
    """One case, in a copy of what fuzz.prepare made. judge, train: those of fuzz.py."""
    out = folder / "out-prfl"
    for _ in range(rng.choice((1, 1, 2, 4))):
        take_apart(out, rng)
    earlier = sorted(path.name for path in out.glob("earlier-*"))
    spec = rng.choice((None, None, "latest", "latest", "checkpoint-000002", *earlier))
    before = all_files(out)
    script, argv = train(folder, "prfl", "--keep", "99", *(["--resume", spec] if spec else []), out=out.name)
    code, _ = judge(f"half-made run folder, --resume {spec}: {sorted(before)}", folder, script, argv,
                    ours=(out.name,))
    after = all_files(out)
    if code == 2:
        changed = {name for name in before.keys() | after.keys()
                   if before.get(name) != after.get(name)} - {".lock"}
        assert not changed, f"a refused run has changed {sorted(changed)}"
    kept = set(after.values())
    for name, content in before.items():
        if "checkpoint-" in name and name.endswith(
            ("train_state.pt", ".safetensors")) and ".tmp/" not in name:
            assert content in kept, f"{name} is lost"
