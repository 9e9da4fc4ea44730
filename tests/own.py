"""What `make own` needs beside the commands of docs/your_model.md: a model, prompts, clips, and people.

    python tests/own.py prepare runs/own            tiny random models, prompts, clips of the embedded world
    python tests/own.py answer label.py samples     starts that command and answers every question of its page
    python tests/own.py best runs/align             makes runs/align/best if no validation was the best
"""
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def prepare(folder):
    """Everything that the walk begins with, in `folder`."""
    from tiny_wan import write_a14b, write_pipelines, write_ti2v

    from world import clips, scene
    folder = Path(folder)
    for name, write, part in (("Wan2.1", write_pipelines, "t2v"), ("Wan2.2-TI2V-5B", write_ti2v, "ti2v"),
                              ("Wan2.2-A14B", write_a14b, "t2v")):
        write(folder / "pipelines")
        (folder / "pipelines" / part).rename(folder / name)
        shutil.rmtree(folder / "pipelines")
    drawn = scene.draw_prompts(40, 5, split="train")
    lists = {"prompts": drawn[:20], "prompts2": drawn[20:], "test": scene.draw_prompts(4, 5, split="test")}
    for name, prompts in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    clips.main(clips.Config(str(folder / "clips"), count=16, kind="clean"))


def grades_of(name):
    """Grades by the number in a clip's name, as one noise is as good as another: qualified on both axes, or
    on neither, and every fifth clip in between."""
    number = int(Path(name).stem)
    if number % 5 == 4:
        return {"physical": 1, "deformity": 2}
    grade = 2 if number % 2 else 0
    return {"physical": grade, "deformity": grade}


def answer(*words):
    """Runs label.py with these words, and answers what its page asks until nothing is left."""
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs would ignore it
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    address = None
    for line in process.stdout:
        print(line, end="", flush=True)
        if found := re.match(r"open (http://\S+)", line):
            address = found[1]
        if line.startswith("answers go to"):
            break
    if address is None:
        raise SystemExit(process.wait() or "label.py printed no address")
    state = json.load(urllib.request.urlopen(f"{address}state"))
    while state["now"]:
        if state["kind"] == "pair":
            said = {"winner": ("left", "tie", "right")[state["done"] % 3]}
        else:
            said = grades_of(state["now"]["name"])
        body = json.dumps({"id": state["now"]["id"], **said}).encode()
        request = urllib.request.Request(f"{address}answer", body, {"Content-Type": "application/json"})
        state = json.load(urllib.request.urlopen(request))
    process.send_signal(signal.SIGINT)                          # as Ctrl-C
    print(process.stdout.read(), end="")
    if process.wait():
        raise SystemExit(process.returncode)


def best(run):
    """A random model may learn nothing in a few steps. Then the last weights stand in for the best ones."""
    run = Path(run)
    if not (run / "best").exists():
        shutil.copytree(run / "transformer", run / "best/transformer")
        adapters = "pytorch_lora_weights.safetensors"
        if (run / adapters).exists():
            shutil.copy(run / adapters, run / "best" / adapters)


if __name__ == "__main__":
    {"prepare": prepare, "answer": answer, "best": best}[sys.argv[1]](*sys.argv[2:])
