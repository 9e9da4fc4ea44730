"""LoRA files of other trainers: what we read is what diffusers and peft make of them."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, generator

from common import InputError
from formats.adapters import BESIDE, HEADER, LAYERS, diffusers_layer, parse_name, read_adapters, share_kept
from formats.weights import diffusers_config
from model import VideoDiT, export_transformer, load_transformer
from scale import lora, parallel

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("cpu")

NAME = "transformer.blocks.0.attn1.to_q"
KINDS = {
    "alpha": dict(r=4, lora_alpha=16),
    "no alpha given": dict(r=4),                                # peft's default is 8
    "rslora": dict(r=4, lora_alpha=16, use_rslora=True),
    "alpha_pattern": dict(r=4, lora_alpha=16, alpha_pattern={"attn2.to_q": 5, r"blocks\.1\.attn2\.to_k": 3,
                                                             "to_q": 2}),
    "rank_pattern": dict(r=4, lora_alpha=16, rank_pattern={"to_q": 2, "blocks.1.attn1.to_v": 6}),
    "both": dict(r=4, lora_alpha=16, rank_pattern={"to_q": 2},
                 alpha_pattern={"^blocks.0.*to_v": 1, "to_q": 6}, use_rslora=True),
}


def theirs(kind):
    """A tiny transformer of diffusers with peft's adapters that do something."""
    torch.manual_seed(0)
    config = {name: x for name, x in diffusers_config(VideoDiT(**TINY).config).items() if name[0] != "_"}
    model = diffusers.WanTransformer3DModel(**config)
    model.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.2"],
                                      init_lora_weights=False,
                                      **KINDS[kind]))
    return model


def deltas(model):
    """{diffusers' name of a layer: what its adapters add}"""
    return {name: module.get_delta_weight("default").detach() for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)}


def require_same(path, wanted):
    found = read_adapters(path)
    assert {diffusers_layer(layer) for layer in found} == wanted.keys()
    for layer, (A, B) in found.items():
        torch.testing.assert_close(B @ A, wanted[diffusers_layer(layer)], rtol=1e-5, atol=1e-6, msg=layer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saves_is_the_same_change(tmp_path, kind):
    """The transformer's own file, and a pipeline's, whose settings name the part; diffusers reads the same
    back."""
    model = theirs(kind)
    wanted = deltas(model)
    model.save_lora_adapter(tmp_path / "model")
    require_same(tmp_path / "model" / lora.FILE, wanted)
    settings = json.loads(json.dumps(model.peft_config["default"].to_dict(), default=list))
    diffusers.WanPipeline.save_lora_weights(tmp_path / "pipeline", peft.get_peft_model_state_dict(model),
                                            transformer_lora_adapter_metadata=settings)
    require_same(tmp_path / "pipeline" / lora.FILE, wanted)
    again = theirs(kind)
    again.delete_adapters("default")
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, transformer=again, vae=None,
                                     scheduler=diffusers.UniPCMultistepScheduler())
    pipeline.load_lora_weights(tmp_path / "pipeline", adapter_name="default")
    require_same(tmp_path / "pipeline" / lora.FILE, deltas(again))


@pytest.mark.parametrize("kind", ["alpha", "both"])
def test_what_peft_saves_is_the_same_change(tmp_path, kind):
    """Its settings lie in a file beside the weights."""
    model = theirs(kind)
    wanted, config = deltas(model), model.peft_config["default"]
    state = peft.get_peft_model_state_dict(model)
    save_file({f"base_model.model.{name}": x.contiguous() for name, x in state.items()},
              tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert (tmp_path / BESIDE).is_file()
    require_same(tmp_path / "adapter_model.safetensors", wanted)
    save_file({f"{name.replace('.weight', '')}.default.weight": x.contiguous() for name, x in state.items()},
              tmp_path / "adapter_model.1.safetensors")  # a state_dict as it is, with the adapter's name
    require_same(tmp_path / "adapter_model.1.safetensors", wanted)


def test_without_alpha_the_scale_is_one(tmp_path):
    """Whatever the ranks, as in diffusers."""
    model = theirs("rank_pattern")
    state = {f"transformer.{name}": x.contiguous()
             for name, x in peft.get_peft_model_state_dict(model).items()}
    save_file(state, tmp_path / lora.FILE)
    again = theirs("alpha")
    again.delete_adapters("default")
    again.load_lora_adapter(tmp_path / lora.FILE, adapter_name="default")
    require_same(tmp_path / lora.FILE, deltas(again))
    A, B = read_adapters(tmp_path / lora.FILE)["blocks.0.self_attn.q"]
    assert torch.equal(A, state[f"{NAME}.lora_A.weight"]) and torch.equal(B, state[f"{NAME}.lora_B.weight"])


@pytest.mark.parametrize("prefix", ["lora_unet__", "lora_unet_"])
def test_underscores_are_read_as_diffusers_reads_them(tmp_path, prefix):
    """VideoX-Fun's reward LoRAs and musubi-tuner's; diffusers reads the latter alone."""
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers as convert
    g, ours, musubi = torch.Generator().manual_seed(0), {}, {}
    for i in range(2):
        for layer in LAYERS:
            wide, high = (48 if layer == name else 24 for name in ("ffn.2", "ffn.0"))
            name = f"blocks_{i}_{layer.replace('.', '_')}"
            part = {"lora_down.weight": torch.randn(4, wide, generator=g),
                    "lora_up.weight": torch.randn(high, 4, generator=g),
                    "alpha": torch.tensor(2.0 + i)}
            ours |= {f"{prefix}{name}.{end}": x for end, x in part.items()}
            musubi |= {f"lora_unet_{name}.{end}": x.clone() for end, x in part.items()}
    save_file(ours, tmp_path / "x.safetensors")
    read, found = convert(musubi), read_adapters(tmp_path / "x.safetensors")
    assert len(found) == 2 * len(LAYERS) == len(read) / 2
    for layer, (A, B) in found.items():
        name = f"transformer.{diffusers_layer(layer)}"
        torch.testing.assert_close(B @ A, read[f"{name}.lora_B.weight"] @ read[f"{name}.lora_A.weight"])


def test_alpha_beside_the_weights_comes_first(tmp_path):
    tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 24), f"{NAME}.lora_B.weight": torch.ones(24, 2),
               f"{NAME}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "x.safetensors", {HEADER: json.dumps({"transformer.lora_alpha": 100})})
    (_, B), = read_adapters(tmp_path / "x.safetensors").values()
    assert torch.equal(B, torch.full((24, 2), 3.0))


def test_settings_beside_another_file_are_not_its_own(tmp_path):
    """Only peft's own name of a file belongs to adapter_config.json."""
    save_file({f"{NAME}.lora_A.weight": torch.ones(2, 24), f"{NAME}.lora_B.weight": torch.ones(24, 2)},
              tmp_path / "x.safetensors")
    (tmp_path / BESIDE).write_text(json.dumps({"lora_alpha": 100}))
    (_, B), = read_adapters(tmp_path / "x.safetensors").values()
    assert torch.equal(B, torch.ones(24, 2))


@pytest.mark.parametrize("settings", ["{", "[]", '"x"', '{"lora_alpha": "16"}', '{"alpha_pattern": 3}',
                                      '{"alpha_pattern": {"to_q": null}}',
                                      '{"lora_alpha": true}', '{"lora_alpha": null}',
                                      '{"alpha_pattern": {"(": 1}}', '{"lora_alpha": 1e999}'])
def test_settings_that_cannot_be_read_are_no_guess(tmp_path, settings):
    tensors = {f"{NAME}.lora_A.weight": torch.ones(2, 24), f"{NAME}.lora_B.weight": torch.ones(24, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {HEADER: settings})
    with pytest.raises(InputError, match="x.safetensors: .*no settings of a LoRA") as error:
        read_adapters(tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [
    "lora_te_text_model_q.lora_down.weight", "transformer_2.blocks.0.attn1.to_q.lora_A.weight",
    "blocks.0.norm3.lora_A.weight",
    "transformer.blocks.0.attn1.to_q.lora_magnitude_vector", "diffusion_model.blocks.0.self_attn.q.diff_b",
    "transformer.blocks.0.attn1.to_q.lora_B.bias", "lora_unet___blocks_0_self_attn_q.lora_up.weight",
    "proj_out.lora_A.weight"])
def test_what_no_layer_is(tmp_path, name):
    """Text encoders, the second expert of Wan2.2, DoRA, biases: a file with any of them is refused by the
    weight's name."""
    assert parse_name(name) is None
    save_file({name: torch.ones(2, 24)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=f"{name} is no adapter"):
        read_adapters(tmp_path / "x.safetensors")


# ---- small changes of half-precision weights
def half_and_adapters(folder, size=1e-5):
    """A generator stored in bfloat16, and a LoRA file beside it that changes its weights by about `size`."""
    dit = generator()
    export_transformer(dit, folder / "base", dtype=torch.bfloat16)
    lora.add(dit, 2)
    g = torch.Generator().manual_seed(1)
    for name, p in dit.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=(size / 2 ** 0.5) ** 0.5, generator=g)
    adapters = lora.scaled(dit.state_dict(), None)
    lora.save(adapters, folder)
    return adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_keeps_what_adapters_add(tmp_path, dtype):
    """The generator as sample.py prepares it: the output of one layer moves by x A B, which a merge in
    bfloat16 would lose."""
    adapters = half_and_adapters(tmp_path)
    base, dit = (load_transformer(tmp_path / "base", dtype=None) for _ in range(2))
    lora.attach(dit, tmp_path / lora.FILE)
    assert not any(p.requires_grad for p in dit.parameters())
    parallel.cast_matrices(dit, dtype)
    name = "blocks.1.cross_attn.o"
    layer, (A, B) = dit.get_submodule(name), adapters[name]
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert layer.lora_A.weight.dtype == layer.lora_B.weight.dtype == dtype
    assert dit.blocks[0].norm3.weight.dtype == dit.patch_embedding.weight.dtype == torch.float32
    assert torch.equal(layer.weight.float(), base.get_submodule(name).weight.float())
    x = torch.randn(5, 24)
    added = layer.lora_B(layer.lora_A(x.to(dtype))).float()
    torch.testing.assert_close(added, x @ A.T @ B.T, rtol=0.05,
                               atol=0.02 * (x @ A.T @ B.T).abs().max().item())
    W = base.get_submodule(name).weight
    assert ((W.float() + B @ A).to(torch.bfloat16) - W).abs().gt(0).float().mean() < 0.1


def test_the_share_that_rounding_leaves(tmp_path):
    """All of large changes or in float32; of small ones what is counted by hand."""
    W, A, B = torch.full((8, 8), 1.0), torch.zeros(1, 8), torch.ones(8, 1)
    A[0, 0] = 1.0                                               # 1 + 1 = 2 is there in bfloat16
    assert share_kept({"x.weight": W + B @ A}, {"x": (A, B)}, torch.bfloat16) == 1.0
    A[0, 0] = 2 ** -10                                          # numbers beside 1 are 2 ** -7 apart
    assert share_kept({"x.weight": W + B @ A}, {"x": (A, B)}, torch.bfloat16) == 0.0
    assert share_kept({"x.weight": W + B @ A}, {"x": (A, B)}, torch.float32) == 1.0
    B[:4] = 2.0 ** 10                                           # half of the rows by 1, half by 2 ** -10
    assert share_kept({"x.weight": W + B @ A}, {"x": (A, B)}, torch.bfloat16) == pytest.approx(1.0, abs=1e-5)
    assert share_kept({}, {}, torch.bfloat16) == 1.0


@pytest.mark.parametrize("size, dtype, told", [(1e-5, "bf16", True), (1e-5, "fp32", False),
                                               (0.1, "bf16", False)])
def test_export_says_what_rounding_takes(tmp_path, capsys, size, dtype, told):
    """Of a run's folder and of its transformer/; the weights are what was merged, rounded."""
    from formats import wan
    half_and_adapters(tmp_path, size)
    dit = load_transformer(tmp_path / "base")
    lora.attach(dit, tmp_path / lora.FILE)
    (tmp_path / "run").mkdir()
    lora.export(dit, tmp_path / "run/transformer")
    for k, folder in enumerate(("run", "run/transformer")):
        wan.export(wan.Export(str(tmp_path / folder), out=str(tmp_path / f"out{k}"), dtype=dtype),
                   load_transformer, export_transformer)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
        assert len(lines) == told
        if told:
            share = int(lines[0].split("only ")[1].split("%")[0])
            assert share < 30 and "--export lora" in lines[0] and str(tmp_path
                                                                      / "run" / lora.FILE) in lines[0]
    merged = load_file(tmp_path / "run/transformer/diffusion_pytorch_model.safetensors")
    stored = load_transformer(tmp_path / "out0", dtype=None).state_dict()
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert all(torch.equal(stored[name], x.to(wanted)) for name, x in merged.items())


def test_a_merge_is_made_in_float32(tmp_path):
    """Also where the weights that it starts from are stored in less."""
    adapters = half_and_adapters(tmp_path)
    half = load_transformer(tmp_path / "base", dtype=None).state_dict()
    name = "blocks.0.self_attn.q.weight"
    merged = lora.merge(half, adapters)[name]
    A, B = adapters["blocks.0.self_attn.q"]
    assert merged.dtype == torch.float32 and torch.equal(merged.make(), half[name].float() + B @ A)


def test_a_plain_runs_export_says_nothing(tmp_path, capsys):
    from formats import wan
    export_transformer(generator(), tmp_path / "run/transformer")
    wan.export(wan.Export(str(tmp_path / "run"), out=str(tmp_path / "out")), load_transformer,
               export_transformer)
    assert "note" not in capsys.readouterr().out
