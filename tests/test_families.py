"""The table of families: which one a config is of, its published values, and which folders are refused, by
whom."""
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import write_data

import common
import data
import evaluate
import families
import sample
import train_align
import train_reward
from common import InputError
from formats.weights import (
    SHIPPED,
    WAN_KEYS,
    expert_folders,
    read_config,
    resolve_model,
    transformer_folder,
)
from model import PRESETS, load_transformer

pytestmark = pytest.mark.usefixtures("cpu")
WAN = PRESETS["wan2.1-t2v-14b"] | {"image_dim": None}
TI2V = PRESETS["wan2.2-ti2v-5b"] | {"image_dim": None}
INDEX = {"_class_name": "WanPipeline", "_diffusers_version": "0.35.0",
         "scheduler": ["diffusers", "UniPCMultistepScheduler"],
         "text_encoder": ["transformers", "UMT5EncoderModel"],
         "tokenizer": ["transformers", "T5TokenizerFast"],
         "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "AutoencoderKLWan"],
         "boundary_ratio": None, "expand_timesteps": False, "transformer_2": [None, None]}
CONFIG = {"_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
          "attention_head_dim": 12,
          "in_channels": 16, "out_channels": 16, "text_dim": 20, "freq_dim": 16, "ffn_dim": 32,
          "num_layers": 2, "eps": 1e-6,
          "image_dim": None}


# ---- which family
@pytest.mark.parametrize("preset, name, task", [
    ("tiny-t2v", "embedded world, tiny", "t2v"), ("tiny-i2v", "embedded world, tiny", "i2v"),
    ("small-t2v", "embedded world, small", "t2v"), ("wan2.1-t2v-1.3b", "Wan2.1 text-to-video", "t2v"),
    ("wan2.1-t2v-14b", "Wan2.1 text-to-video", "t2v"), ("wan2.1-i2v-14b", "Wan2.1 image-to-video", "i2v"),
    ("wan2.2-ti2v-5b", "Wan2.2 TI2V-5B text-to-video", "t2v")])
def test_each_preset_has_its_family(preset, name, task):
    row = families.of_config({"image_dim": None} | PRESETS[preset])
    assert (row.name, row.task) == (name, task)


@pytest.mark.parametrize("kind", SHIPPED)
def test_what_is_shipped_is_used_as_ever(kind):
    config = transformer_folder(SHIPPED[kind])[1]
    assert families.sampling_defaults(config) == {
        "size": (32, 32), "frames": 9, "fps": 8.0, "num_inference_steps": 32, "guidance_scale": 1.0,
        "shift": 1.0,
        "negative_prompt": None}
    assert families.training_defaults(config, "align", 3, 2) == {
        "learning_rate": 1e-4, "batch_size": 32, "gradient_accumulation_steps": 1, "max_train_steps": 120,
        "num_inference_steps": 16}
    assert families.training_defaults(config, "reward") == {"learning_rate": 2e-3,
                                                            "trunk_learning_rate": 1e-3,
                                                            "batch_size": 64}


def test_the_small_worlds_videos():
    found = families.sampling_defaults(PRESETS["small-t2v"])
    assert (found["size"], found["frames"]) == ((64, 64), 17)
    assert families.latent_shape(PRESETS["small-t2v"], (64, 64), 17) == (16, 5, 8, 8)


def test_sizes_and_latents_are_each_others_inverse():
    assert families.latent_shape(WAN, (832, 480), 81) == (16, 21, 60, 104)
    assert families.video_size(WAN, (16, 21, 60, 104)) == (832, 480)
    assert families.latent_shape(TI2V, (1280, 704), 121) == (48, 31, 44, 80)
    assert families.video_size(TI2V, (48, 31, 44, 80)) == (1280, 704)


def test_a_narrow_wan_is_wans():
    """Its width decides nothing."""
    narrow = WAN | {"dim": 24}
    assert families.sampling_defaults(narrow) == families.sampling_defaults(WAN)
    assert families.training_defaults(narrow, "reward") == families.training_defaults(WAN, "reward") == {
        "learning_rate": 1e-5, "trunk_learning_rate": 1e-6, "batch_size": 2}


@pytest.mark.parametrize("more, words", [
    ({"out_dim": 24, "in_dim": 24}, "24 channels"), ({"model_type": "i2v", "in_dim": 36}, "without CLIP"),
    ({"image_dim": 1280}, "t2v .* with CLIP"), ({"model_type": "i2v"}, "i2v .* 16 channels and without CLIP"),
    ({"model_type": "i2v", "in_dim": 100, "out_dim": 48}, "i2v .* 48 channels and without CLIP"),
    ({"boundary_ratio": 0.9, "in_dim": 48, "out_dim": 48}, "of two experts for t2v .* 48 channels")])
def test_a_config_of_no_family(more, words):
    """Half of Wan2.2 A14B's image-to-video and some that nobody has published."""
    with pytest.raises(InputError, match=f"{words}.* not supported, or half of one of two experts"):
        families.of_config(WAN | more)


@pytest.mark.parametrize("files", [{"model_index.json": INDEX | {"expand_timesteps": True},
                           "transformer/config.json": CONFIG | {"in_channels": 48, "out_channels": 48}},
                          {"config.json": TI2V | {"_class_name": "WanModel", "model_type": "ti2v"}}],
                         ids=["diffusers", "its authors"])
def test_one_folder_for_both_tasks(tmp_path, files):
    """Wan2.2 TI2V-5B: --task chooses; other models have a task of their own."""
    write(tmp_path, files)
    for asked, task, pinned in ((None, "t2v", False), ("t2v", "t2v", False), ("i2v", "i2v", True)):
        row = families.of_config(transformer_folder(tmp_path, asked)[1])
        assert (row.task, row.pinned, row.channels, row.space, row.side) == (task, pinned, 48, 16, 32)
        config = train_align.Config(model=str(tmp_path), task=asked)
        assert resolve_model(config) == str(tmp_path) and config.task == task
    write(tmp_path / "wan2.1", pipeline())
    with pytest.raises(InputError, match="--task is i2v, but the generator in .* is t2v"):
        resolve_model(train_align.Config(model=str(tmp_path / "wan2.1"), task="i2v"))


# ---- what it takes where nobody says otherwise
@pytest.mark.parametrize("sides, shift", [
    ((832, 480), 3.0), ((1280, 720), 5.0), ((624, 624), 3.0), ((720, 720), 5.0), ((1920, 1088), 5.0),
    ((1280, 704), 3.0),
    ((848, 480), 3.0), ((736, 720), 5.0), ((960, 544), 3.0)])
def test_portrait_is_shifted_as_landscape(sides, shift):
    for size in (sides, sides[::-1]):
        assert families.sampling_defaults(WAN, size)["shift"] == shift
    assert families.sampling_defaults(PRESETS["tiny-t2v"], sides)["shift"] == 1.0


@pytest.mark.parametrize("flag, shift", [("480*832", 3.0), ("720*1280", 5.0), ("832*480", 3.0),
                                         ("1088*1920", 5.0)])
def test_sampling_and_evaluation_ask_for_the_shift_of_both_sides(flag, shift):
    config = sample.Config("a red circle", size=flag)
    width, height = map(int, flag.split("*"))
    assert sample.settle(config, WAN) == (width, height)
    assert config.shift == shift


def test_an_update_is_as_near_to_thirty_videos_as_ranks_and_batch_allow(monkeypatch):
    for world, shared, batch in itertools.product((1, 2, 4, 8, 16, 64), (1, 2, 4), (None, 1, 2, 3, 7)):
        if world % shared:
            continue
        monkeypatch.setenv("WORLD_SIZE", str(world))
        found = families.training_defaults(WAN, "align", batch, shared)["gradient_accumulation_steps"]
        videos = world // shared * (batch or 1)
        assert abs(videos * found - 30) == min(abs(videos * k - 30)
                                               for k in range(1, 40)), (world, shared, batch)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert families.training_defaults(WAN, "align", None, 4)["gradient_accumulation_steps"] == 15
    assert families.training_defaults(WAN, "align", 2)["gradient_accumulation_steps"] == 2


# ---- what is refused
def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def pipeline(**more):
    return {"model_index.json": INDEX | more, "transformer/config.json": CONFIG}


EXPERT = ["diffusers", "WanTransformer3DModel"]
SECOND = {"transformer_2/config.json": CONFIG}
REFUSED = {
    "half of a14b": (pipeline(transformer_2=EXPERT, boundary_ratio=0.875),
                     "half of a generator of two experts .Wan2.2 A14B.: the low-noise one, .*_2, is missing"),
    "half without a boundary": (pipeline(transformer_2=EXPERT), "half .* the low-noise one"),
    "half by its boundary alone": (pipeline(boundary_ratio=0.9), "half .* the low-noise one"),
    "the other half": (SECOND | {"model_index.json": INDEX | {"boundary_ratio": 0.9}},
                       "half .* the high-noise one, .*transformer, is missing"),
    "half of its authors": ({"high_noise_model/config.json": CONFIG},
                            "half .* the low-noise one, .*low_noise_model, is missing"),
    "half of a run": ({"transformer_2/config.json": CONFIG | {"_expert": "low", "_boundary_ratio": 0.9,
                                                               "_other": "/nowhere"}},
                      "half .* the high-noise one, /nowhere, is missing: put it, or a link to it, at .*er$"),
    "half of a run, with no path": ({"transformer_2/config.json": CONFIG | {
        "_expert": "low", "_boundary_ratio": 0.9, "_other": 3}}, "half .* the high-noise one"),
    "no boundary": ({"transformer/config.json": CONFIG} | SECOND, "does not say .* boundary_ratio is None"),
    "a wrong boundary": (pipeline(transformer_2=EXPERT, boundary_ratio=[0.9]) | SECOND,
                         "boundary_ratio is .0.9"),
    "no experts of one generator": (pipeline(transformer_2=EXPERT, boundary_ratio=0.9) | {
        "transformer_2/config.json": CONFIG | {"num_layers": 3}}, "no two experts of one generator"),
    "times of 16 channels": (pipeline(expand_timesteps=True), "names expand_timesteps .Wan2.2 TI2V-5B"),
    "vace": (pipeline(_class_name="WanVACEPipeline"), "WanVACEPipeline: not supported"),
    "animate": (pipeline(_class_name="WanAnimatePipeline"), "WanAnimatePipeline: not supported"),
    "nameless": (pipeline(_class_name=None), "None: not supported"),
    "custom": (pipeline(_class_name=["pipeline", "Mine"]), "Mine.*: not supported"),
    "unknown part": (pipeline(audio_encoder=["transformers", "Wav2Vec2Model"]),
                     "names audio_encoder, which nothing here reads"),
    "unknown switch": (pipeline(is_distilled=True), "names is_distilled"),
    "not json": (pipeline() | {"model_index.json": "{"}, "is not JSON"),
    "no object": (pipeline() | {"model_index.json": []}, "holds no JSON object"),
    "vace's transformer": ({"transformer/config.json": CONFIG | {"_class_name": "WanVACETransformer3DModel"}},
                           "WanVACETransformer3DModel: not supported"),
    "vace of its authors": ({"config.json": {"_class_name": "VaceWanModel", "model_type": "vace"}},
                            "VaceWanModel: not supp"),
    "s2v of its authors": ({"config.json": {"_class_name": "WanModel_S2V", "model_type": "s2v"}},
                           "WanModel_S2V: not supported"),
    "ti2v of 16 channels": ({"config.json": {"_class_name": "WanModel", "model_type": "ti2v"}},
                               "model_type is 'ti2v'"),
    "fun control": ({"config.json": {"_class_name": "WanModel", "model_type": "i2v", "in_dim": 48,
                                     "out_dim": 16, "dim": 24,
                                     "image_dim": 8}}, "takes 48 channels: not supported"),
    "fun control in diffusers": ({"transformer/config.json": CONFIG | {"in_channels": 52}},
                                 "takes 52 channels"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_with_a_part_that_nothing_reads(tmp_path, kind, monkeypatch):
    files, words = REFUSED[kind]
    folder = write(tmp_path / "model", files)
    monkeypatch.chdir(write(tmp_path / "here", {"config.json": CONFIG}))    # whoever stands here
    for use in (load_transformer, transformer_folder,
                lambda path: resolve_model(train_align.Config(model=str(path)))):
        with pytest.raises(InputError, match=words) as error:
            use(folder)
        assert "\n" not in str(error.value) and "model" in str(error.value)


WAN_CONFIG = {key: value for key, value in WAN.items() if key != "image_dim"} | {"_class_name": "WanModel"}
PAIRS = {
    "diffusers": (pipeline(transformer_2=EXPERT, boundary_ratio=0.75) | SECOND, "transformer",
                  "transformer_2", 0.75),
    "its authors, t2v": ({f"{name}_noise_model/config.json": WAN_CONFIG | {"image_dim": None}
                          for name in ("high", "low")}, "high_noise_model", "low_noise_model", 0.875),
    "its authors, i2v": ({f"{name}_noise_model/config.json": WAN_CONFIG | {
        "model_type": "i2v", "in_dim": 36, "image_dim": None} for name in ("high", "low")},
                         "high_noise_model", "low_noise_model", 0.9),
    "a run": ({f"transformer{end}/config.json": CONFIG | {"_boundary_ratio": 0.8} for end in ("", "_2")},
              "transformer", "transformer_2", 0.8)}


@pytest.mark.parametrize("kind", PAIRS)
def test_one_expert_alone_is_the_pair(tmp_path, kind):
    """Whichever of the folders is named, also by a link: the generator is both."""
    files, high, low, boundary = PAIRS[kind]
    write(tmp_path / "model", files)
    (tmp_path / "elsewhere").symlink_to(tmp_path / "model" / low)
    for folder in (tmp_path / "model", tmp_path / "model" / high, tmp_path / "model" / low,
                   tmp_path / "elsewhere"):
        pair = expert_folders(folder)
        assert (pair.high.name, pair.low.name, pair.boundary) == (high, low, boundary)
        config = transformer_folder(folder)[1]
        assert config["boundary_ratio"] == boundary
        assert families.of_config(config).name.startswith("Wan2.2 A14B")


def test_a_run_that_trained_one_expert_says_where_the_other_is(tmp_path):
    write(tmp_path / "base", PAIRS["diffusers"][0])
    for name, other, folder in (("low", "high", "transformer_2"), ("high", "low", "transformer")):
        notes = {"_expert": name, "_boundary_ratio": 0.6,
                 "_other": str(tmp_path / "base" / {"high": "transformer", "low": "transformer_2"}[other])}
        write(tmp_path / name, {f"{folder}/config.json": CONFIG | notes})
        write(tmp_path / "moved" / name, {"config.json": CONFIG | notes})
        for path, own in ((tmp_path / name, tmp_path / name / folder),
                          (tmp_path / name / folder, tmp_path / name / folder),
                          (tmp_path / "moved" / name, tmp_path / "moved" / name)):
            pair = expert_folders(path)
            assert (getattr(pair, name), str(getattr(pair, other))) == (own, notes["_other"])
            assert pair.boundary == 0.6
        # a copy beside it comes first
        copy = Path(notes["_other"]).name
        here = write(tmp_path / name, {f"{copy}/config.json": CONFIG})
        assert getattr(expert_folders(here), other) == here / copy


@pytest.mark.parametrize("more",
                         [{}, {"_class_name": "WanImageToVideoPipeline",
                               "image_encoder": ["transformers", "CLIPVision"],
                                       "image_processor": [None, None]},
                                       {"_class_name": "WanVideoToVideoPipeline"}])
def test_wan21s_own_index_is_known(tmp_path, more):
    write(tmp_path, pipeline(**more))
    assert transformer_folder(tmp_path)[1]["dim"] == 24


CLIP = {"clips/metadata.jsonl": {"file_name": "a.mp4", "prompt": "a", "label": 1}, "prompts.txt": "a\n"}
COMMANDS = {
    "align": (train_align, "--method sft --data {0}/shards --output_dir {0}/out --model {0}/model"),
    "reward": (train_reward, "--data {0}/shards --output_dir {0}/out --model {0}/model"),
    "sample": (sample, "--prompt a --output {0}/out.mp4 --model {0}/model"),
    "sample's transformer": (sample, "--prompt a --output {0}/out.mp4 --transformer {0}/model/transformer"),
    "sample's encoders": (sample, "--prompt a --output {0}/out.mp4 --model {0}/model --transformer {1}"),
    "evaluate": (evaluate, "a={0}/model --prompts {0}/prompts.txt --output_dir {0}/out --model {0}/model"),
    "evaluate's model": (evaluate, "a={1} --prompts {0}/prompts.txt --output_dir {0}/out --model {0}/model"),
    "check": (data.COMMANDS["check"], "{0}/clips --model {0}/model"),
    "encode": (data.COMMANDS["encode"], "{0}/clips --out {0}/out --model {0}/model"),
}


@pytest.mark.parametrize("command, kind", [
    (command, kind) for command in COMMANDS for kind in ("half of a14b", "times of 16 channels")
    # only the encoders of that folder are used
    if kind != "half of a14b" or command not in ("sample's encoders", "evaluate's model")])
def test_every_command_refuses_it_in_one_line(tmp_path, capsys, kind, command):
    write(tmp_path / "model", REFUSED[kind][0])
    write(tmp_path, CLIP)
    write_data(tmp_path / "shards")
    module, argv = COMMANDS[command]
    main, Config = module if isinstance(module, tuple) else (module.main, module.Config)
    words = [word.format(tmp_path, SHIPPED["t2v"]) for word in argv.split()]       # a folder may have blanks
    with pytest.raises(SystemExit) as end:
        common.cli(main, Config, "", words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert end.value.code == 2 and len(lines) == 1
    assert re.search(REFUSED[kind][1], lines[0]) and str(tmp_path / "model") in lines[0]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("key", WAN_KEYS)
def test_a_config_that_lacks_what_all_have(tmp_path, key):
    """The table of families reads a config before a model is made from it."""
    config = read_config(SHIPPED["t2v"] / "transformer")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name != key}))
    with pytest.raises(InputError, match=f"config.json: {key} is missing"):
        train_reward.resolve(train_reward.Config(model=str(tmp_path)))


@pytest.mark.parametrize("value", [[8], "8", 8.0, True, 0, {}])
@pytest.mark.parametrize("key", [*WAN_KEYS[1:], "text_dim", "image_dim"])
def test_a_config_that_counts_with_something_else(tmp_path, key, value):
    config = read_config(SHIPPED["t2v"] / "transformer")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(InputError, match=f"config.json: {key} is "):
        train_reward.resolve(train_reward.Config(model=str(tmp_path)))


def test_the_vae_of_another_family(tmp_path):
    """Before its weights are looked at."""
    for more in ({"z_dim": 48}, {"scale_factor_spatial": 16}, {"scale_factor_temporal": 8},
                 {"z_dim": 48, "scale_factor_spatial": 32}):
        write(tmp_path, {"config.json": {"_class_name": "AutoencoderKLWan"} | more})
        with pytest.raises(InputError, match="the VAE of a family that is not supported"):
            families.load_vae(tmp_path)


def test_encoders_of_another_generator(tmp_path):
    """By their config.json alone; what a config does not say is not compared."""
    configs = {"vae/config.json": {"_class_name": "AutoencoderKLWan", "z_dim": 48},
               "text_encoder/config.json": {}}
    write(tmp_path, configs)
    families.require_encoders({"out_dim": 48, "text_dim": 20}, tmp_path, "--model x")
    with pytest.raises(InputError, match="^--model x: takes 16 channels of latents, .*/vae gives 48: give"):
        families.require_encoders({"out_dim": 16, "text_dim": 20}, tmp_path, "--model x")
    for width in ({"model_type": "umt5", "d_model": 24}, {"text_dim": 24}):
        write(tmp_path, configs | {"text_encoder/config.json": width})
        with pytest.raises(InputError, match="x: takes 20 numbers per token of text, .*encoder gives 24"):
            families.require_encoders({"out_dim": 48, "text_dim": 20}, tmp_path, "x")


def test_the_first_frames_condition_by_hand():
    """The embedded world: zeros behind the frame's code. Wan: the code of the frame with blank frames behind
    it."""
    class Mean(torch.nn.Module):
        def encode(self, video):                                # [b, 3, F, H, W] -> [b, 2, (F + 3) / 4, 2, 2]
            frames = video.mean((1, 3, 4)) + 2                  # so that blank frames are seen
            latent = torch.stack([frames[:, 0], *frames[:, 1:].unflatten(1, (-1, 4)).mean(2).T]).T \
                if video.shape[2] > 1 else frames
            return latent[:, None, :, None, None].expand(-1, 2, -1, 2, 2)

    class Tokens(torch.nn.Module):
        def encode(self, images):
            return images.float().mean((1, 2))[:, None]         # [b, 1, 3]

    first = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    given = families.image_conditions(PRESETS["tiny-i2v"] | {"image_dim": None}, Mean(), None, first, 9)
    code = (first.float() / 127.5 - 1).mean((1, 2, 3)) + 2
    assert given.keys() == {"y"} and given["y"].shape == (2, 6, 3, 2, 2)
    torch.testing.assert_close(given["y"][:, 4, :, 0, 0], torch.stack([code, 0 * code, 0 * code], 1))
    given = families.image_conditions(TI2V | {"model_type": "i2v"}, Mean(), None, first, 9)
    assert given.keys() == {"first_frame"} and given["first_frame"].shape == (2, 2, 1, 2, 2)
    torch.testing.assert_close(given["first_frame"][:, 0, 0, 0, 0], code)
    wan = WAN | {"model_type": "i2v", "in_dim": 36, "image_dim": 3}
    given = families.image_conditions(wan, Mean(), Tokens(), first, 9)
    torch.testing.assert_close(given["y"][:, 4, :, 0, 0], torch.stack([code, 0 * code + 2, 0 * code + 2], 1))
    assert given["y"][:, :4, 0].eq(1).all() and not given["y"][:, :4, 1:].any()
    torch.testing.assert_close(given["clip_tokens"], first.float().mean((1, 2))[:, None])


@pytest.mark.parametrize("loaded, blank", [("text_encoder", False), (None, True)])
def test_which_text_encoder_asks_for_blank_frames(loaded, blank):
    text = families.load_text_encoder(SHIPPED["t2v"] / loaded) if loaded else torch.nn.Identity()
    assert families.takes_blank_frames(text) == blank
