"""study/reproduce.py: the study of the annotator, in small."""
import json

from study import parts, reproduce


def test_the_annotator_passes_clean_clips_and_fails_flawed_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PRESETS["quick"], "clips", 40)
    config = reproduce.Config("annotator", "quick", output_dir=str(tmp_path), results_dir=str(tmp_path))
    reproduce.annotator(parts.Work(config))
    found = json.loads((tmp_path / "annotator.json").read_text())
    text = (tmp_path / "annotator.md").read_text()
    assert found["clean_pass"] >= 0.95 and found["flawed_fail"] >= 0.85 and len(found["fails"]) == 13
    assert found["fails"]["wrong color in the prompt"] == 1 and "40 clean and 40 clearly flawed clips" in text
