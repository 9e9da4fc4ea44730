"""formats/shards.py: several folders of shards as one."""
import json

import pytest
import torch

import data
from common import InputError
from formats import fingerprint
from formats.shards import join


def write(folder, seed, count, shape=(4, 2, 2, 2), labels=(0, 1), encoders=None):
    g = torch.Generator().manual_seed(seed)
    latents, contexts = torch.randn(count, *shape, generator=g), torch.randn(count, 3, 8, generator=g)
    settings = {"encoders": encoders} if encoders else None
    data.write_shards(folder, latents, contexts, [labels[i % len(labels)] for i in range(count)],
                      [f"prompt {seed} {i}" for i in range(count)], settings=settings)
    return latents, contexts


def test_joined_folders_are_all_clips_in_their_order(tmp_path):
    written = [write(tmp_path / str(seed), seed, count) for seed, count in enumerate((5, 3, 2))]
    shards = join([data.Shards(tmp_path / str(seed)) for seed in range(3)])
    latents, contexts = (torch.cat(parts) for parts in zip(*written))
    assert len(shards) == 10 and shards.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 0, 1]
    pick = [9, 0, 5, 7, 5]
    batch = shards.batch(pick)
    assert torch.equal(batch["latents"], latents[pick]) and torch.equal(batch["context"], contexts[pick])
    assert batch["prompt"] == ["prompt 2 1", "prompt 0 0", "prompt 1 0", "prompt 1 2", "prompt 1 0"]
    assert batch["label"].tolist() == [1, 0, 0, 0, 0]
    apart = [fingerprint.of_shards(data.Shards(tmp_path / str(seed))) for seed in range(3)]
    assert len({fingerprint.of_shards(shards), *apart}) == 4


def test_copies_are_known_over_folders(tmp_path):
    """A clip of the first round that is in the second round again lies on one side of a fold and of the
    held-out set."""
    latents, contexts = write(tmp_path / "a", 0, 6)
    data.write_shards(tmp_path / "b", latents[[4, 1]], contexts[[0, 1]], [1, 0], ["x", "y"])
    shards = join([data.Shards(tmp_path / "a"), data.Shards(tmp_path / "b")])
    assert shards.copies.tolist() == [0, 1, 2, 3, 4, 5, 4, 1]


def test_folders_that_do_not_fit_are_refused(tmp_path):
    write(tmp_path / "a", 0, 4, encoders={"vae": "1"})
    write(tmp_path / "b", 1, 4, shape=(4, 3, 2, 2), encoders={"vae": "1"})
    write(tmp_path / "c", 1, 4, encoders={"vae": "2"})
    for other, words in (("b", "same --model, --size and --frames"), ("c", "other encoders")):
        with pytest.raises(InputError, match=words) as error:
            join([data.Shards(tmp_path / name) for name in ("a", other)])
        assert f"{tmp_path / other}" in str(error.value) and "\n" not in str(error.value)


def test_train_reward_learns_from_two_rounds(tmp_path, capsys, cpu):
    from tiny import generator, run, write_data

    import model
    model.export_transformer(generator(), tmp_path / "generator/transformer")
    for name in ("a", "b"):
        write_data(tmp_path / name)
    flags = ["--model", str(tmp_path / "generator"), "--output_dir", str(tmp_path / "out"),
             "--mixed_precision", "no", "--max_train_steps", "1", "--batch_size", "4", "--depth", "1",
             "--holdout", "6"]
    run("train_reward", [*flags, "--data", str(tmp_path / "a"), str(tmp_path / "b")])
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["held_out"] + report["trained_on"] == 64      # 32 of each folder
    # each has a copy in the other folder, on its side
    assert report["held_out"] % 2 == 0 < report["held_out"]
    with pytest.raises(SystemExit):
        run("train_reward",
            [*flags, "--data", str(tmp_path / "a"), str(tmp_path / "b"), "--labels", "x.jsonl"])
    assert "--labels replaces the labels.jsonl of one folder" in capsys.readouterr().err
