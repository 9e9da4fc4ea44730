"""No circle of imports, no script that is imported, the method on its own; and tests in a random order."""
import ast
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import shuffled

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("world", "formats", "scale", "study")
SCRIPTS = {"label", "train_reward", "train_align", "sample", "evaluate", "world.pretrain", "study.reproduce",
           "study.cost",
           "study.node", "study.dit", "study.why", "study.candidates"}
METHOD = ("experts", "flow", "model", "pavrm", "prfl", "refl_baseline", "rl_baselines", "search")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in (".", *ROOMS) for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}


def imports(path):
    """{module of ours that the file imports, wherever in it}, but not what it imports only when it runs as a
    command."""
    found = set()
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body
                 if not (isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_there_is_no_circle():
    left = dict(GRAPH)
    while leaves := [name for name, uses in left.items() if not uses & left.keys()]:
        left = {name: uses for name, uses in left.items() if name not in leaves}
    assert not left, f"these import each other in a circle: {sorted(left)}"


def test_no_script_is_imported():
    found = {(name, used) for name, uses in GRAPH.items() for used in uses & SCRIPTS}
    assert not found


def test_the_method_imports_only_itself_and_what_is_below():
    for name in METHOD:
        allowed = (*METHOD, "families", "common")
        above = {used for used in GRAPH[name] if used not in allowed and not used.startswith("formats.")}
        assert not above, f"{name}.py imports {above}"
    assert GRAPH["common"] == set() == GRAPH["report"]


def test_rooms_look_downwards():
    may = {"world": {"world", "formats", "families", "data", *METHOD, "common"},
           # pavrm and prfl for scale/simulate.py
           "scale": {"scale", "formats", "families", "experts", "flow", "model", "pavrm", "prfl", "common"},
           "formats": {"formats", "common"}}
    for name, uses in GRAPH.items():
        room = name.split(".")[0]
        if room in may:
            wrong = {used for used in uses if used not in may[room] and used.split(".")[0] not in may[room]}
            assert not wrong, f"{name} imports {wrong}"


def test_a_seed_gives_an_order_of_files_and_of_the_tests_in_each():
    items = [SimpleNamespace(path=path, number=i) for path in "abcde" for i in range(9)]
    orders = [[(item.path, item.number) for item in shuffled(items, seed)] for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1] and all(sorted(order) == sorted(orders[0]) for order in orders)
    for order in orders[:2]:
        files = [order[k][0] for k in range(0, 45, 9)]
        assert sorted(files) == [*"abcde"]
        assert [path for path, _ in order] == [file for file in files for _ in range(9)]
        assert any([number for path, number in order if path == file] != [*range(9)] for file in files)


DRAWN = []


def test_draws_are_the_same_whatever_was_drawn_before():
    """Two tests, in any order: each draws first what the other one drew first."""
    DRAWN.append((torch.rand(()).item(), np.random.rand()))
    assert DRAWN[0] == DRAWN[-1]


def test_draws_are_the_same_in_another_test():
    test_draws_are_the_same_whatever_was_drawn_before()
