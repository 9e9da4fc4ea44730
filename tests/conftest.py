import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from tiny import TINY, generator, write_data

from formats.weights import save_module
from model import export_transformer
from pavrm import PAVRM
from refl_baseline import FRAMES, PixelReward
from world.vae import VideoVAE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with generator/ (with its VAE and reward models) and data/; the runs of this file go beside them."""
    folder = tmp_path_factory.mktemp("training")
    export_transformer(generator(), folder / "generator/transformer")
    save_module(PAVRM.from_generator(generator(), 1), folder / "generator/reward")
    save_module(VideoVAE(dim=8, num_blocks=1), folder / "generator/vae")
    for frames in FRAMES:
        save_module(PixelReward(frames, TINY["text_dim"], width=8), folder / f"generator/reward_rgb_{frames}")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
