"""model.py, weights.py: parity with diffusers, folders of three spellings, the model against itself, text."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import InputError
from families import load_text_encoder
from formats import weights
from formats.weights import WEIGHTS, diffusers_config, diffusers_name, load_weights, save_module
from model import (
    PRESETS,
    VideoDiT,
    apply_rope,
    export_transformer,
    first_frame_condition,
    load_transformer,
    rope_table,
)
from world.text_encoder import TextEncoder

T2V = dict(in_dim=4, out_dim=4, dim=24, ffn_dim=40, freq_dim=16, text_dim=8, text_len=5, num_heads=2,
           num_layers=3)
I2V = T2V | dict(model_type="i2v", in_dim=12)                # 4 noisy + 4 mask + 4 first frame
CLIP = I2V | dict(image_dim=10, text_len=512, num_layers=2)  # diffusers splits image from text at 512 tokens
INDEX = f"{WEIGHTS}.index.json"


def randomise(module, seed=0):
    """Every parameter random, activations near one: zeros and ones would hide mistakes."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        r = torch.randn(p.shape, generator=g)
        if p.dim() == 1:
            p.data = 0.3 * r + (name.endswith("weight"))       # norms around one, biases around zero
        else:
            p.data = 0.5 * r if p.dim() == 3 else r / p[0].numel() ** 0.5  # modulation; matrices by fan-in
    return module


def make_dit(config=T2V, seed=0):
    return randomise(VideoDiT(**config), seed).eval()


def inputs(config=T2V, b=2, size=(3, 4, 6), text=None, seed=1, dtype=torch.float32):
    """Keyword arguments of a VideoDiT of that config."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    x = draw(b, config["out_dim"], *size)
    args = dict(x=x, t=torch.rand(b, generator=g).to(dtype), context=draw(b, text or config["text_len"], 8))
    if config["in_dim"] > config["out_dim"]:
        args["y"] = draw(b, config["in_dim"] - config["out_dim"], *size)
    if config.get("image_dim"):
        args["clip_tokens"] = draw(b, 7, config["image_dim"])
    return args


def relative(ours, truth):
    assert ours.shape == truth.shape and ours.isfinite().all() and truth.abs().max() > 0
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


def error_of(function, *args, **kwargs):
    """The message of the InputError that the call raises; one line, as the command line prints it."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- diffusers' WanTransformer3DModel as the truth
@pytest.fixture(scope="module")
def Wan():
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers, which has its own Wan2.1")
    return diffusers.WanTransformer3DModel


def make_theirs(Wan, config, seed=0):
    ours = diffusers_config(VideoDiT(**config).config)
    return randomise(Wan(**{k: v for k, v in ours.items() if not k.startswith("_")}), seed).eval()


def run_theirs(theirs, x, t, context, y=None, clip_tokens=None):
    x = x if y is None else torch.cat([x, y], dim=1)
    return theirs(x, 1000 * t, context, clip_tokens, return_dict=False)[0]


@pytest.mark.parametrize("config, b, size", [
    (T2V, 1, (1, 2, 2)), (T2V, 2, (3, 4, 6)), (T2V, 1, (4, 8, 6)),          # 1, 18 and 48 tokens
    (T2V | dict(dim=20), 2, (5, 2, 4)), (T2V | dict(dim=64, num_heads=4), 1, (2, 4, 4)),  # 10, 16 a head
    (T2V | dict(patch_size=(2, 1, 2)), 2, (4, 3, 4)),
    (T2V | dict(eps=1e-2, out_dim=6, in_dim=6), 2, (3, 4, 2)),
    (I2V, 2, (3, 4, 6)), (I2V, 1, (1, 4, 4)), (CLIP, 2, (3, 4, 6)), (CLIP, 1, (5, 4, 8))])
def test_parity_with_diffusers(Wan, config, b, size):
    theirs, ours = make_theirs(Wan, config), VideoDiT(**config)
    state = theirs.state_dict()
    assert {diffusers_name(name) for name in ours.state_dict()} == state.keys()
    ours.load_state_dict({name: state[diffusers_name(name)] for name in ours.state_dict()})
    args = inputs(config, b, size)
    with torch.no_grad():
        assert relative(ours(**args), run_theirs(theirs, **args)) < 1e-4


@pytest.mark.parametrize("config", [T2V, CLIP])
def test_gradients_agree_with_diffusers(Wan, config):
    theirs, ours = make_theirs(Wan, config), VideoDiT(**config)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[diffusers_name(name)] for name in ours.state_dict()})
    args = inputs(config)
    direction = torch.randn(args["x"].shape, generator=torch.Generator().manual_seed(2))
    (ours(**args) * direction).sum().backward()
    (run_theirs(theirs, **args) * direction).sum().backward()
    truth = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert relative(p.grad, truth[diffusers_name(name)]) < 1e-4, name


@pytest.mark.parametrize("config", [T2V, I2V, CLIP])
@pytest.mark.parametrize("shard", [None, "10KB"])
def test_reads_diffusers_folders(Wan, tmp_path, config, shard):
    theirs = make_theirs(Wan, config)
    theirs.save_pretrained(tmp_path, **({} if shard is None else dict(max_shard_size=shard)))
    assert (tmp_path / INDEX).exists() == (shard is not None) != (tmp_path / WEIGHTS).exists()
    if config["text_len"] != 512:  # diffusers pads prompts outside of its model
        assert load_transformer(tmp_path).config["text_len"] == 512
        stored = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stored | {"_text_len": config["text_len"]}))
    ours = load_transformer(tmp_path)
    assert ours.config == VideoDiT(**config).config
    args = inputs(config)
    with torch.no_grad():
        assert relative(ours(**args), run_theirs(theirs, **args)) < 1e-4


@pytest.mark.parametrize("config", [T2V, I2V, CLIP])
def test_diffusers_reads_our_export(Wan, tmp_path, config):
    ours = make_dit(config)
    export_transformer(ours, tmp_path / "out", layout="diffusers")
    theirs, report = Wan.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    args = inputs(config)
    with torch.no_grad():
        assert relative(ours(**args), run_theirs(theirs.eval(), **args)) < 1e-4
    back = load_transformer(tmp_path / "out")
    assert back.config == ours.config
    assert all(torch.equal(back.state_dict()[name], p) for name, p in ours.state_dict().items())


def test_unread_weights_of_published_i2v_folders_are_ignored(tmp_path):
    export_transformer(make_dit(CLIP), tmp_path / "out", layout="diffusers")
    state = load_file(tmp_path / "out" / WEIGHTS)
    save_file(state | {"blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, tmp_path / "out" / WEIGHTS)
    load_transformer(tmp_path / "out")
    save_file(state | {"blocks.0.attn2.norm_other.weight": torch.ones(24)}, tmp_path / "out" / WEIGHTS)
    assert "1 unexpected: blocks.0.attn2.norm_other.weight" in error_of(load_transformer, tmp_path / "out")


@pytest.mark.parametrize("preset, count", [("wan2.1-t2v-1.3b", 1_418_996_800),
                                           ("wan2.1-t2v-14b", 14_288_491_584),
                                           ("wan2.1-i2v-14b", 16_394_878_784)])
def test_presets_have_the_published_number_of_parameters(Wan, preset, count):
    with torch.device("meta"):
        ours = VideoDiT(**PRESETS[preset])
        theirs = Wan(**{k: v for k, v in diffusers_config(ours.config).items() if not k.startswith("_")})
    shapes = {name: p.shape for name, p in theirs.named_parameters()}
    assert {diffusers_name(name): p.shape for name, p in ours.named_parameters()} == shapes
    total = sum(p.numel() for p in ours.parameters())
    assert total == sum(p.numel() for p in theirs.parameters()) and total == count


def test_official_names_are_those_that_diffusers_converts(Wan):
    """diffusers' own converter of official checkpoints, image tokens (img_emb, k_img, v_img) included."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    official = make_dit(CLIP).state_dict()
    assert {"img_emb.proj.1.weight", "blocks.0.cross_attn.k_img.weight", "blocks.0.cross_attn.v_img.bias",
            "blocks.0.cross_attn.norm_k_img.weight"} <= official.keys()
    converted = convert_wan_transformer_to_diffusers(dict(official))
    assert converted.keys() == make_theirs(Wan, CLIP).state_dict().keys()
    assert all(torch.equal(converted[diffusers_name(name)], p) for name, p in official.items())


# ---- official folders
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float16, torch.float32]])
def test_round_trip_is_bit_for_bit(tmp_path, layout, dtypes):
    """Stored in half precision or a mixture, loaded to float32, written back: the same file."""
    export_transformer(make_dit(CLIP), tmp_path / "a", layout)
    state = load_file(tmp_path / "a" / WEIGHTS)
    state = {name: p.to(dtypes[i % len(dtypes)]) for i, (name, p) in enumerate(state.items())}
    save_file(state, tmp_path / "a" / WEIGHTS)
    dit = load_transformer(tmp_path / "a")
    assert all(p.dtype == torch.float32 for p in dit.parameters())
    export_transformer(dit, tmp_path / "b", layout)
    again = load_file(tmp_path / "b" / WEIGHTS)
    assert again.keys() == state.keys()
    assert all(again[name].dtype == p.dtype and torch.equal(again[name], p) for name, p in state.items())
    as_stored = load_transformer(tmp_path / "a", dtype=None)
    assert {p.dtype for p in as_stored.parameters()} == set(dtypes)
    export_transformer(dit, tmp_path / "c", layout, dtype=torch.float32)
    assert {p.dtype for p in load_file(tmp_path / "c" / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_sharded_image_to_video_folder_round_trip_is_bit_for_bit(tmp_path, layout):
    """The 14B models are published in shards, in bfloat16."""
    export_transformer(make_dit(CLIP), tmp_path / "a", layout, dtype=torch.bfloat16)
    state = load_file(tmp_path / "a" / WEIGHTS)
    (tmp_path / "a" / WEIGHTS).unlink()
    names = sorted(state)
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, tmp_path / "a" / file)
    (tmp_path / "a" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    export_transformer(load_transformer(tmp_path / "a"), tmp_path / "b", layout)
    again = load_file(tmp_path / "b" / WEIGHTS)
    assert again.keys() == state.keys() and any("img" in name or "image" in name for name in again)
    assert all(again[name].dtype == torch.bfloat16 and torch.equal(again[name], p)
               for name, p in state.items())


@pytest.mark.parametrize("config", [T2V, I2V, CLIP])
def test_official_config(tmp_path, config):
    dit = make_dit(config)
    export_transformer(dit, tmp_path, layout="wan")
    assert set(load_file(tmp_path / WEIGHTS)) == set(dit.state_dict())
    official = {key: value for key, value in dit.config.items() if key != "image_dim"}
    official |= {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "qk_norm": True,
                 "cross_attn_norm": True, "window_size": [-1, -1]}
    (tmp_path / "config.json").write_text(json.dumps(official))
    loaded = load_transformer(tmp_path)
    assert loaded.config == dit.config
    args = inputs(config)
    assert torch.equal(loaded(**args), dit(**args))
    for key, value in dict(qk_norm=False, cross_attn_norm=False, window_size=[7, 7]).items():
        (tmp_path / "config.json").write_text(json.dumps(official | {key: value}))
        assert "config.json" in (message := error_of(load_transformer, tmp_path)) and key in message


def test_short_official_config(tmp_path):
    """The published config.json leaves text_dim 4096 and patch_size (1, 2, 2) unsaid."""
    dit = make_dit(T2V | dict(text_dim=4096, text_len=512))
    export_transformer(dit, tmp_path)
    keys = ("model_type", "text_len", "in_dim", "dim", "ffn_dim", "freq_dim", "out_dim", "num_heads",
            "num_layers", "eps")
    official = {"_class_name": "WanModel"} | {key: dit.config[key] for key in keys}
    (tmp_path / "config.json").write_text(json.dumps(official))
    assert load_transformer(tmp_path).config == dit.config


def test_loading_from_a_parent_and_writing_in_place(tmp_path):
    dit = make_dit()
    export_transformer(dit, tmp_path / "transformer")
    loaded = load_transformer(tmp_path)
    randomise(loaded, seed=3)
    expected = {name: p.clone() for name, p in loaded.state_dict().items()}
    kept = load_transformer(tmp_path)                       # must survive the file that it came from
    export_transformer(loaded, tmp_path / "transformer")
    assert all(torch.equal(p, dit.state_dict()[name]) for name, p in kept.state_dict().items())
    assert all(torch.equal(p, expected[name]) for name, p in load_transformer(tmp_path).state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["transformer"]
    assert "wan or diffusers" in error_of(export_transformer, dit, tmp_path / "x", layout="flax")


@pytest.mark.parametrize("broken", ["before", "within"])
def test_interrupted_export_leaves_the_old_folder(tmp_path, monkeypatch, broken):
    old, new = make_dit(seed=0), make_dit(seed=5)
    export_transformer(old, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def interrupted(tensors, path, *rest):
        if broken == "within":
            Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "stream_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_transformer(new, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    export_transformer(new, tmp_path / "out")  # what the last attempt left is not in the way
    assert torch.equal(load_transformer(tmp_path / "out").head.head.weight, new.head.head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- folders that cannot be read
@pytest.fixture(scope="module", params=["wan", "diffusers"])
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / request.param
    export_transformer(make_dit(), path, layout=request.param)
    return path


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_missing_files_are_named(folder):
    assert str(folder / "nowhere") in error_of(load_transformer, folder / "nowhere")
    (folder / WEIGHTS).rename(folder / "hidden")
    assert str(folder) in (message := error_of(load_transformer, folder)) and WEIGHTS in message
    (folder / "config.json").unlink()
    assert str(folder) in (message := error_of(load_transformer, folder)) and "config.json" in message


@pytest.mark.parametrize("text", [
    "", "{\n\"dim\": ", "[1, 2]", "3", "{}", "\x00", '{"dim": "wide"}', '{"dim": 25}', '{"depth": 3}',
    '{"num_heads": 0}', '{"patch_size": 2}', '{"model_type": "vace"}', '{"num_attention_heads": 2}',
    '{"window_size": 3}'])
def test_broken_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    assert str(folder) in error_of(load_transformer, folder)


def test_config_that_is_not_text_is_named(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x80")
    assert f"{folder}/config.json" in error_of(load_transformer, folder)


@pytest.mark.parametrize("keep", [0, 7, 60, 0.5, -1])
def test_truncated_weights_are_named(folder, keep):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:int(len(data) * keep)] if keep == 0.5 else data[:keep])
    assert str(folder / WEIGHTS) in error_of(load_transformer, folder)


def test_wrong_tensors_are_listed(folder):
    state = load_file(folder / WEIGHTS)
    name = next(n for n in state if n.startswith("blocks.1") and n.endswith("bias"))
    rest = {n: p for n, p in state.items() if n != name}
    for changed, word in [(rest, "1 missing"), (state | {name + "_x": torch.ones(2)}, "1 unexpected"),
                          (state | {name: torch.ones(3)}, "1 of another shape")]:
        save_file(changed, folder / WEIGHTS)
        message = error_of(load_transformer, folder)
        assert str(folder) in message and f"{word}: {name}" in message
    save_file({}, folder / WEIGHTS)
    assert f"{len(state)} missing" in (message := error_of(load_transformer, folder)) and len(message) < 400


def test_broken_shards_are_named(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(state)
    shards = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: state[n] for n in part}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / INDEX).write_text(json.dumps(index))
    assert torch.equal(load_transformer(folder).head.head.bias, make_dit().head.head.bias)
    (folder / "part-2.safetensors").write_bytes((folder / "part-2.safetensors").read_bytes()[:-4])
    assert "part-2.safetensors" in error_of(load_transformer, folder)
    (folder / "part-2.safetensors").unlink()
    assert "part-2.safetensors" in error_of(load_transformer, folder)
    for text in ("{", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}',
                 r'{"weight_map": {"a": "\ud800"}}'):              # a name that no file can have
        (folder / INDEX).write_text(text)
        assert INDEX in error_of(load_transformer, folder)


def test_folder_of_another_module_is_refused(tmp_path):
    save_module(TextEncoder(width=16, heads=2), tmp_path / "text")
    message = error_of(load_weights, TextEncoder(width=32, heads=2), tmp_path / "text")
    assert "config.json" in message and "width 16 instead of 32" in message
    assert "text" in error_of(load_transformer, tmp_path / "text")


# ---- the model against itself
@pytest.mark.parametrize("config", [T2V, CLIP])
def test_gradient_checkpointing_changes_nothing(config):
    results = []
    for on in (False, True):
        dit, args = make_dit(config), inputs(config)
        dit.gradient_checkpointing = on
        wanted = {k: v.requires_grad_() for k, v in args.items()} | dict(dit.named_parameters())
        calls = []
        dit.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        out = dit(**args)
        out.square().sum().backward()
        assert len(calls) == 1 + on                          # recomputed in the backward pass, and only then
        results.append({"out": out.detach()} | {name: v.grad for name, v in wanted.items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert all(v.any() for v in results[0].values())


def test_features_are_the_first_blocks():
    dit, args = make_dit(), inputs()
    x, t, context = args.values()
    f, h, w = 3, 2, 3                                        # the token grid of a latent of (3, 4, 6)
    with torch.no_grad():
        tokens = dit.patch_embedding(x).flatten(2).transpose(1, 2)                           # [b, n, d]
        e, e_blocks = dit.embed_time(t)
        text = dit.text_embedding(context)
        rope = rope_table((f, h, w), 12, x.device, torch.float32)
        for depth in range(len(dit.blocks) + 1):
            features = dit.features(x, t, context, depth=depth)
            assert features.shape == (2, 18, 24) and relative(features, tokens) < 1e-5
            if depth < len(dit.blocks):
                tokens = dit.blocks[depth](tokens, e_blocks, text, None, rope)
        out = dit.head(features, e[:, None]).view(2, f, h, w, 1, 2, 2, 4)                # b f h w pf ph pw c
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)                         # [b, c, f, h, w]
        assert torch.equal(out, dit(x, t, context))


def test_features_do_not_run_the_rest():
    dit = make_dit()
    shallow = VideoDiT(**T2V | dict(num_layers=1))
    shallow.load_state_dict({name: dit.state_dict()[name] for name in shallow.state_dict()})
    dit.blocks[1].forward = None
    args = inputs()
    assert torch.equal(dit.features(**args, depth=1), shallow.features(**args, depth=1))


def test_short_context_is_zero_padded():
    dit, args = make_dit(), inputs(text=2)
    context = args.pop("context")
    padded = torch.cat([context, torch.zeros(2, 3, 8)], dim=1)
    assert torch.equal(dit(**args, context=context), dit(**args, context=padded))
    assert torch.equal(dit(**args, context=context[:, :0]), dit(**args, context=torch.zeros(2, 5, 8)))
    assert relative(dit(**args, context=context), dit(**args, context=padded.roll(1, 0))) > 1e-3


@pytest.mark.parametrize("config", [T2V, I2V, CLIP])
def test_items_of_a_batch_do_not_meet(config):
    dit, args, other = make_dit(config), inputs(config, b=3), inputs(config, b=3, seed=9)
    mixed = {k: torch.cat([args[k][:1], other[k][1:]]) for k in args}
    with torch.no_grad():
        together, alone = dit(**args), dit(**{k: v[:1] for k, v in args.items()})
        assert relative(together[:1], alone) < 1e-5 and relative(dit(**mixed)[:1], alone) < 1e-5
        # every input matters for its own item
        for key in args:
            changed = dit(**args | {key: torch.cat([other[key][:1], args[key][1:]])})
            assert relative(changed[:1], together[:1]) > 1e-3 and relative(changed[1:], together[1:]) < 1e-5


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_positions_matter(axis, monkeypatch):
    """Without rotary positions, moved frames, rows or columns would only move the output."""
    dit, args = make_dit(), inputs(size=(3, 6, 6))
    move = dict(shifts=1 if axis == 2 else 2, dims=axis)     # whole patches
    with torch.no_grad():
        out = dit(**args)
        moved = dit(**args | {"x": args["x"].roll(**move)}).roll(-move["shifts"], axis)
        assert relative(moved, out) > 1e-3
        monkeypatch.setattr("model.rope_table", lambda *_: torch.ones(1, 1, 6, dtype=torch.complex64))
        out = dit(**args)
        moved = dit(**args | {"x": args["x"].roll(**move)}).roll(-move["shifts"], axis)
        assert relative(moved, out) < 1e-5


def test_a_gpus_norm_and_a_compiled_blocks_rotation_are_ours(monkeypatch):
    """F.rms_norm, which has a kernel of its own there, and real products in place of complex ones."""
    x, table = torch.randn(2, 24, 2, 12), rope_table((2, 3, 4), 12, torch.device("cpu"), torch.float32)
    rotated, dit = apply_rope(x, table), make_dit()
    velocity = dit(**inputs())
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    ours = dit(**inputs())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, table), rotated)
    torch.testing.assert_close(ours, velocity, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours, velocity)                      # another way



def test_rope_is_relative_and_in_closed_form():
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64).unbind()
    table = rope_table((6, 5, 4), 12, q.device, q.dtype).view(6, 5, 4, 1, 6)
    score = lambda a, b: (apply_rope(q, table[a]) * apply_rope(k, table[b])).sum()
    assert torch.isclose(score((4, 3, 2), (1, 2, 0)), score((5, 4, 3), (2, 3, 1)), rtol=1e-12)
    assert not torch.isclose(score((4, 3, 2), (1, 2, 0)), score((5, 4, 3), (1, 2, 0)), rtol=1e-3)
    # 12 channels are 2 pairs for each axis, of angles p and p / 100
    angles = torch.tensor([5, 0.05, 4, 0.04, 3, 0.03], dtype=torch.float64)
    assert torch.allclose(table[5, 4, 3, 0], torch.polar(torch.ones_like(angles), angles), rtol=1e-12)


@pytest.mark.parametrize("config", [T2V, CLIP])
def test_double_precision(config):
    dit, args = make_dit(config), inputs(config)
    with torch.no_grad():
        single = dit(**args)
        double = dit.double()(**{k: v.double() for k, v in args.items()})
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert 0 < relative(single, double) < 1e-4


@pytest.mark.parametrize("config", [T2V, CLIP])
def test_half_precision(config):
    """bfloat16 keeps 8 bits: a few blocks stay within some percent, stored so or under autocast."""
    dit, args = make_dit(config), inputs(config)
    with torch.no_grad():
        truth = dit(**args)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = dit(**args)
        half = dit.bfloat16()(**args)
    assert mixed.dtype == half.dtype == torch.float32
    assert 0 < relative(mixed, truth) < 0.05 and 0 < relative(half, truth) < 0.05


def test_velocity_starts_at_zero():
    assert not VideoDiT(**T2V)(**inputs()).any()


@pytest.mark.parametrize("changes, words", [
    (dict(x=(2, 5, 3, 4, 6)), "[2, 5, 3, 4, 6]"), (dict(x=(2, 4, 3, 5, 6)), "[3, 5, 6]"),
    (dict(x=(2, 4, 3, 4, 7)), "patch"), (dict(x=(4, 3, 4, 6)), "[4, 3, 4, 6]"),
    (dict(t=(3,)), "t has shape [3]"), (dict(t=(2, 1)), "t has shape [2, 1]"), (dict(t=()), "t has shape []"),
    (dict(context=(2, 5, 9)), "context"), (dict(context=(2, 6, 8)), "at most 5"),
    (dict(context=(1, 5, 8)), "context"), (dict(context=(5, 8)), "context"),
    (dict(y=(2, 1, 3, 4, 6)), "x with y"), (dict(y=(1, 8, 3, 4, 6)), "y has shape"),
    (dict(y=(2, 8, 2, 4, 6)), "y has shape"), (dict(clip_tokens=(2, 7, 10)), "clip"),
    (dict(depth=4), "depth is 4"), (dict(depth=-1), "depth is -1")])
def test_wrong_inputs_are_named(changes, words):
    args = inputs() | {k: v if k == "depth" else torch.zeros(v) for k, v in changes.items()}
    dit = make_dit()
    assert words in error_of(dit.features if "depth" in changes else dit, **args)


@pytest.mark.parametrize("config, changes, words", [
    (I2V, dict(y=None), "x with y"), (I2V, dict(y=(2, 7, 3, 4, 6)), "x with y"),
    (CLIP, dict(clip_tokens=None), "clip"), (CLIP, dict(clip_tokens=(1, 7, 10)), "clip"),
    (CLIP, dict(clip_tokens=(2, 7, 11)), "clip"), (CLIP, dict(clip_tokens=(2, 10)), "clip")])
def test_wrong_image_inputs_are_named(config, changes, words):
    args = inputs(config) | {k: None if v is None else torch.zeros(v) for k, v in changes.items()}
    assert words in error_of(make_dit(config), **args)


@pytest.mark.parametrize("change", [
    dict(model_type="flf2v"), dict(dim=25), dict(num_heads=8), dict(num_heads=6), dict(num_heads=0),
    dict(freq_dim=15)])
def test_impossible_models_are_refused(change):
    error_of(VideoDiT, **T2V | change)


def test_first_frame_condition():
    x0 = torch.randn(2, 16, 3, 4, 6)
    y = first_frame_condition(x0)
    assert y.shape == (2, 20, 3, 4, 6) and y.dtype == x0.dtype
    assert (y[:, :4, 0] == 1).all() and torch.equal(y[:, 4:, 0], x0[:, :, 0]) and not y[:, :, 1:].any()
    later = torch.randn(2, 16, 2, 4, 6)
    assert torch.equal(first_frame_condition(torch.cat([x0[:, :, :1], later], dim=2)), y)
    config = PRESETS["tiny-i2v"]
    assert config["in_dim"] - config["out_dim"] == y.shape[1]
    dit = VideoDiT(**config | dict(num_layers=1))
    assert dit(x0, torch.rand(2), torch.zeros(2, 8, 128), y).shape == x0.shape


# ---- text
PROMPTS = ["", "a red ball", "a blue ball", "🎈 über 漢字", "lone \ud800 surrogate", "x" * 10_000, " ",
           "\x00"]


@pytest.fixture
def text():
    return randomise(TextEncoder(text_len=6, text_dim=10, width=16, heads=2, max_bytes=40)).eval()


@pytest.mark.parametrize("grad", [False, True])  # PyTorch's attention has another path without gradients
def test_every_prompt_has_a_context_of_its_own(text, grad):
    with torch.set_grad_enabled(grad):
        together = text.encode(PROMPTS)
        assert together.shape == (len(PROMPTS), 6, 10) and together.isfinite().all()
        for i, prompt in enumerate(PROMPTS):
            # the neighbours bring padding along; alone there is none
            assert torch.allclose(text.encode([prompt])[0], together[i], atol=1e-5)
            assert all((together[i] - together[j]).abs().max() > 1e-3 for j in range(i))
        assert torch.allclose(text.encode(PROMPTS[::-1]).flip(0), together, atol=1e-5)


def test_padding_tokens_are_not_seen(text):
    ids = torch.tensor([[text.START, *b"word"]])
    padded = torch.nn.functional.pad(ids, (0, 20), value=text.PAD)
    assert torch.allclose(text(ids), text(padded), atol=1e-5)
    with torch.no_grad():
        text.bytes.weight[text.PAD] += 100
    assert torch.allclose(text(ids), text(padded), atol=1e-5)


def test_long_prompts_are_cut(text):
    assert torch.equal(text.encode(["x" * 40]), text.encode(["x" * 10_000]))
    assert not torch.allclose(text.encode(["x" * 39]), text.encode(["x" * 40]), atol=1e-4)
    text.encode(["é" * 19 + "x🎈"])                          # cut within a character
    assert torch.equal(text.encode(["ab"]), text.encode(["ab"]))
    assert (text.encode(["ab"]) - text.encode(["ba"])).abs().max() > 1e-3  # order counts


def test_text_encoder_learns(text):
    text.encode(["a ball", "b"]).square().mul(torch.randn(2, 6, 10)).sum().backward()
    assert all(p.grad.isfinite().all() for p in text.parameters())
    assert not text.bytes.weight.grad[text.PAD].any() and text.bytes.weight.grad[ord("b")].any()


def test_text_encoder_round_trip(text, tmp_path):
    save_module(text, tmp_path / "text")
    loaded = load_text_encoder(tmp_path / "text")
    assert loaded.config == text.config and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(loaded.state_dict()[name], p) for name, p in text.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded.encode(PROMPTS), text.encode(PROMPTS))
    save_module(loaded, tmp_path / "again")
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "text" / file).read_bytes()


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"depth": 3}', '{"width": "wide"}'])
def test_broken_text_encoder_is_named(text, tmp_path, config):
    save_module(text, tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(config)
    assert "config.json" in error_of(load_text_encoder, tmp_path / "text")
