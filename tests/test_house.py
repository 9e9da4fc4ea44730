"""The house stands as it was drawn: no circle of imports, no script imported by another, the method on its own."""
import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("world", "formats", "scale", "study")
SCRIPTS = {"label", "train_reward", "train_align", "sample", "evaluate", "world.pretrain", "study.reproduce", "study.cost",
           "study.node", "study.dit", "study.why", "study.candidates"}
METHOD = ("flow", "model", "pavrm", "prfl", "refl_baseline", "rwr_baseline", "search")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in (".", *ROOMS) for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}


def imports(path):
    """{module of ours that the file imports, wherever in it}, but not what it imports only when it runs as a command."""
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
        above = {used for used in GRAPH[name] if used not in (*METHOD, "families", "common") and not used.startswith("formats.")}
        assert not above, f"{name}.py imports {above}"
    assert GRAPH["common"] == set() == GRAPH["report"]


def test_rooms_look_downwards():
    may = {"world": {"world", "formats", "families", "data", *METHOD, "common"},
           "scale": {"scale", "formats", "families", "model", "pavrm", "prfl", "common"},   # pavrm, prfl: for scale/simulate.py
           "formats": {"formats", "common"}}
    for name, uses in GRAPH.items():
        room = name.split(".")[0]
        if room in may:
            wrong = {used for used in uses if used not in may[room] and used.split(".")[0] not in may[room]}
            assert not wrong, f"{name} imports {wrong}"
