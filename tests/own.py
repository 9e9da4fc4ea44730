"""What `make own` needs beside the commands of docs/your_model.md: a model, prompts, clips, and labels.

    python tests/own.py prepare runs/own      a tiny random Wan2.1, prompts and clips of the embedded world
    python tests/own.py label runs/own        a labels.jsonl like label.py's, with grades by a fixed rule
"""
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402
from formats import labels  # noqa: E402
from world import clips, scene  # noqa: E402


def prepare(folder):
    from tiny_wan import write_pipelines
    write_pipelines(folder / "wan")
    for name, split, count in (("prompts", "train", 20), ("test", "test", 4)):
        (folder / f"{name}.txt").write_text("\n".join(scene.draw_prompts(count, 5, split=split)) + "\n")
    clips.main(clips.Config(str(folder / "clips"), count=16, kind="clean"))


def label(folder):
    """Every other sample qualified on both axes, or on neither; every fifth in between. Noise has no better grades."""
    rows = data.read_metadata(folder / "samples")
    grades = [(1, 2) if i % 5 == 4 else (2, 2) if i % 2 else (0, 0) for i in range(len(rows))]
    lines = [{"file_name": row["file_name"], "annotator": "script", "physical": a, "deformity": b, "time": round(time.time(), 2)}
             for row, (a, b) in zip(rows, grades)]
    path = folder / "samples/labels.jsonl"
    lines = [line | {"contents": labels.contents_beside(path, line)} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    {"prepare": prepare, "label": label}[sys.argv[1]](Path(sys.argv[2]))
