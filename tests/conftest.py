"""What every test file gets: one thread, its own random draws, and on request an order that nobody chose."""
import os
import random
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pytest
import torch
from tiny import TINY, generator, write_data

from formats.weights import save_module
from model import export_transformer
from pavrm import PAVRM
from refl_baseline import FRAMES, PixelReward
from world.vae import VideoVAE

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--order-seed", type=int, metavar="SEED",
                     help="shuffle the files, and the tests in each; default: the order they are written in")


def pytest_collection_modifyitems(config, items):
    if config.option.order_seed is not None:
        items[:] = shuffled(items, config.option.order_seed)


def shuffled(items, seed):
    """Files in a random order, and in each of them its tests, so that a file's fixtures are made once.
    Afterwards pytest itself brings together the tests that share a parameter of a file's fixture."""
    rng, files = random.Random(seed), {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = rng.sample(list(files.values()), len(files))
    return [item for tests in order for item in rng.sample(tests, len(tests))]


def pytest_terminal_summary(terminalreporter, config):
    if config.option.order_seed is not None:
        terminalreporter.write_line(f"The same order again: --order-seed {config.option.order_seed}")


def seed_everything(name):
    """Afterwards draws without a generator of their own depend on nothing but `name`."""
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef):
    seed_everything(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    seed_everything("test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with generator/ (with its VAE and reward models) and data/. A file's runs go beside them."""
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
