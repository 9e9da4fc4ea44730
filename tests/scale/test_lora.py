"""LoRA: the base at step 0, the merge, diffusers' reading of the file, and training with --lora_rank."""
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    STEPS,
    command,
    distance,
    generator,
    run,
    same,
    weights,
)

from common import InputError
from formats import runs, wan
from formats.adapters import LAYOUTS, read_adapters
from formats.weights import Later, full_tensor
from model import VideoDiT, export_transformer, load_transformer
from scale import lora

pytestmark = pytest.mark.usefixtures("cpu")
LORA = ["--lora_rank", "2", "--lora_alpha", "4", "--learning_rate", "1e-3"]


def export(*args, **more):
    wan.export(wan.Export(*args, **more), load_transformer, export_transformer)


def batch():
    g = torch.Generator().manual_seed(5)
    return torch.randn(3, 16, 2, 4, 4, generator=g), torch.rand(3,
                                                                generator=g), torch.randn(3, 3, 8,
                                                                                          generator=g)


def adapted(alpha=4):
    """A generator with adapters of rank 2 that do something, beside their values by hand."""
    dit = generator()
    lora.add(dit, 2, alpha)
    g = torch.Generator().manual_seed(6)
    for name, p in dit.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3, generator=g)
    return dit


def test_step_0_is_the_base_and_only_adapters_train():
    dit = generator()
    base = dit(*batch())
    before = {name: p.clone() for name, p in dit.state_dict().items()}
    lora.add(dit, 2, 8)
    assert torch.equal(dit(*batch()), base)
    dit(*batch()).square().sum().backward()
    for name, p in dit.named_parameters():
        assert p.requires_grad == (".lora_" in name) and (p.grad is None) == (".lora_" not in name)
        if "lora_B" in name:
            assert p.grad.abs().max() > 0, name
    assert {name.split(".lora_")[0] for name, p in dit.named_parameters() if p.requires_grad} == {
        f"blocks.{i}.{kind}_attn.{x}" for i in range(2) for kind in ("self", "cross") for x in "qkvo"}
    state = dit.state_dict()
    assert same({name: full_tensor(x) for name, x in lora.merge(state, lora.scaled(state, 8)).items()},
                before)


@pytest.mark.parametrize("alpha", [None, 4])
def test_merged_by_hand_and_equal_outputs(tmp_path, alpha):
    dit = adapted(alpha)
    state, plain = dit.state_dict(), generator().state_dict()
    for name in [name for name in state if name.endswith("lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight")
        plain[f"{layer}.weight"] += (1 if alpha is None
                                     else 2) * state[f"{layer}.lora_B.weight"] @ state[name]
    export_transformer(dit, tmp_path / "merged", state=lora.merge(state, lora.scaled(state, alpha)))
    merged = load_transformer(tmp_path / "merged")
    assert distance(merged.state_dict(), plain) < 1e-6
    out = dit(*batch())
    torch.testing.assert_close(merged(*batch()), out, rtol=1e-5, atol=1e-5)
    assert (out - generator()(*batch())).norm() > 0.05 * out.norm()


def test_diffusers_reads_the_file(tmp_path):
    """Transformer and pipeline load it, and their outputs are ours."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    dit = adapted()
    export_transformer(generator(), tmp_path / "base", layout="diffusers")
    lora.save(lora.scaled(dit.state_dict(), 4), tmp_path)
    assert len(load_file(tmp_path / lora.FILE)) == len([n for n in dit.state_dict() if ".lora_" in n]) == 32
    x, t, context = batch()
    wanted = dit(x, t, context)

    def theirs():
        return diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "base").eval()

    def velocity(transformer):
        with torch.no_grad():
            return transformer(hidden_states=x, timestep=1000 * t, encoder_hidden_states=context).sample

    alone = theirs()
    alone.load_lora_adapter(tmp_path / lora.FILE)
    pipeline = diffusers.WanPipeline(tokenizer=None, text_encoder=None, transformer=theirs(), vae=None,
                                     scheduler=diffusers.UniPCMultistepScheduler())
    pipeline.load_lora_weights(str(tmp_path))
    for transformer in (alone, pipeline.transformer):
        assert sum(".lora_" in name for name, _ in transformer.named_parameters()) == 32
        torch.testing.assert_close(velocity(transformer), wanted, rtol=1e-4, atol=1e-4)
    assert (velocity(theirs()) - wanted).norm() > 0.05 * wanted.norm()


def test_training(folder):
    """Adapters and merged weights are written and agree; the base has no optimizer state; resume is bit for
    bit."""
    run(*command(folder, "prfl", "lora", *LORA))
    checkpoint = folder / "lora/checkpoint-000005"
    state = runs.load_state(checkpoint)
    assert len(state["optimizer"]["state"]) == len(state["model"]) == 32
    assert all(".lora_" in name for name in state["model"])
    base, merged = generator().state_dict(), weights(folder, "prfl", "lora")
    adapters = load_file(folder / "lora" / lora.FILE)
    B, A = (adapters[f"transformer.blocks.1.attn2.to_out.0.lora_{x}.weight"] for x in "BA")
    assert B.abs().max() > 1e-4
    name = "blocks.1.cross_attn.o.weight"
    torch.testing.assert_close(merged[name], base[name] + B @ A)
    for name in base:
        moves = name.endswith(("attn.q.weight", "attn.k.weight", "attn.v.weight", "attn.o.weight"))
        assert torch.equal(base[name], merged[name]) != moves, name
    run(*command(folder, "prfl", "resumed", *LORA, "--resume", str(folder / "lora/checkpoint-000004")))
    assert (folder / "resumed" / lora.FILE).read_bytes() == (folder / "lora" / lora.FILE).read_bytes()
    assert same(weights(folder, "prfl", "resumed"), merged)
    assert same(runs.load_state(folder / "resumed/checkpoint-000005"), state) and state["step"] == STEPS


def test_adapters_start_alike_whatever_was_drawn_before():
    """A run on more ranks, or a resumed one, starts from the same A."""
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        dit = VideoDiT(**generator().config)
        torch.rand(seed)
        lora.add(dit, 2, seed=7)
        found.append({name: p for name, p in dit.state_dict().items() if "lora_A" in name})
    assert same(*found) and len({x.sum().item() for x in found[0].values()}) == 16


# ---- files
def test_both_layouts_say_the_same_and_convert_both_ways(tmp_path):
    dit = adapted()
    wanted = lora.scaled(dit.state_dict(), 4)
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        lora.save(lora.scaled(dit.state_dict(), 4), tmp_path / layout, layout)
    names = load_file(tmp_path / "wan" / lora.FILE)
    assert "diffusion_model.blocks.1.cross_attn.o.lora_B.weight" in names and len(names) == 32
    for first, second in (LAYOUTS, LAYOUTS[::-1]):
        export(str(tmp_path / first / lora.FILE), out=str(tmp_path / f"{first}.safetensors"), layout=second,
               dtype="fp32")
        assert same(load_file(tmp_path / f"{first}.safetensors"), load_file(tmp_path / second / lora.FILE))
        assert same(read_adapters(tmp_path / first / lora.FILE), wanted)
    with pytest.raises(InputError, match="is there already"):
        export(str(tmp_path / "wan" / lora.FILE), out=str(tmp_path / "wan.safetensors"))


def test_diffusers_converts_comfyuis_names_to_the_same_adapters(tmp_path):
    """diffusers reads both layouts; what it makes of ComfyUI's is what we write for it."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import WanLoraLoaderMixin
    for layout in LAYOUTS:
        lora.save(lora.scaled(adapted().state_dict(), 4), tmp_path, layout)
        (tmp_path / lora.FILE).rename(tmp_path / f"{layout}.safetensors")
    read = {layout: WanLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=f"{layout}.safetensors")
            for layout in LAYOUTS}
    assert same(read["wan"], read["diffusers"]) and len(read["wan"]) == 32


def test_files_of_other_trainers_are_read(tmp_path):
    """lora_down, lora_up and alpha; names joined by underscores; feed-forward layers."""
    A, B = torch.randn(2, 24), torch.randn(48, 2)
    save_file({"lora_unet_blocks_1_ffn_0.lora_down.weight": A, "lora_unet_blocks_1_ffn_0.lora_up.weight": B,
               "lora_unet_blocks_1_ffn_0.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    (layer, (a, b)), = read_adapters(tmp_path / "x.safetensors").items()
    assert layer == "blocks.1.ffn.0" and torch.equal(a, A) and torch.equal(b, B / 2)
    dit = generator()
    lora.attach(dit, tmp_path / "x.safetensors")
    x = torch.randn(3, 24)
    torch.testing.assert_close(dit.blocks[1].ffn[0](x), generator().blocks[1].ffn[0](x) + x @ A.T @ B.T / 2)


def test_training_goes_on_from_a_file(folder, tmp_path):
    """The run starts where the file's model stands, with its rank, and says so by its outputs; sampling
    merges the same."""
    dit = adapted()
    lora.save(lora.scaled(dit.state_dict(), 4), tmp_path)
    started, merged = generator(), generator()
    lora.add(started, 0, 8, path=tmp_path / lora.FILE)          # another alpha: the same function
    lora.attach(merged, tmp_path / lora.FILE)
    torch.testing.assert_close(started(*batch()), dit(*batch()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged(*batch()), dit(*batch()), rtol=1e-5, atol=1e-5)
    run(*command(folder, "sft", "onwards", "--lora", str(tmp_path / lora.FILE), "--learning_rate", "1e-4"))
    before, after = (load_file(path / lora.FILE) for path in (tmp_path, folder / "onwards"))
    assert before.keys() == after.keys() and 1e-5 < distance(before, after) < 2e-3


@pytest.mark.parametrize("tensors, words", [
    ({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 24)},
     "A and B of blocks.0.self_attn.q"),
    ({"text_encoder.layers.0.q.lora_A.weight": torch.zeros(2, 24)}, "no adapter"), ({}, "holds no adapters"),
    ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 30),
      "blocks.0.self_attn.q.lora_B.weight": torch.zeros(30, 2)},
     "another model"),
    ({"blocks.7.self_attn.q.lora_A.weight": torch.zeros(2, 24),
      "blocks.7.self_attn.q.lora_B.weight": torch.zeros(24, 2)},
     "another model")])
def test_files_that_do_not_fit(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "x.safetensors")
    dit = generator()
    path = tmp_path / "x.safetensors"
    for use in (lambda: lora.add(dit, 0, path=path), lambda: lora.attach(dit, path)):
        with pytest.raises(InputError, match=words) as error:
            use()
        assert "x.safetensors" in str(error.value)
    assert same(dit.state_dict(), generator().state_dict())


def test_a_file_that_is_cut_or_of_another_rank(tmp_path):
    lora.save(lora.scaled(adapted().state_dict(), 4), tmp_path)
    with pytest.raises(InputError, match="--lora_rank 3: .* have rank 2"):
        lora.add(generator(), 3, path=tmp_path / lora.FILE)
    (tmp_path / lora.FILE).write_bytes((tmp_path / lora.FILE).read_bytes()[:500])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        lora.add(generator(), 0, path=tmp_path / lora.FILE)


def test_adapters_alone_leave_no_empty_folder_behind(tmp_path):
    dit = adapted()
    for kept in (False, True):
        (tmp_path / "transformer").mkdir()
        if kept:
            (tmp_path / "transformer/config.json").touch()
        assert lora.export(dit, tmp_path / "transformer", kind="lora") == [tmp_path / lora.FILE]
        assert (tmp_path / lora.FILE).is_file() and (tmp_path / "transformer").is_dir() == kept


def test_adapters_start_as_a_linear_layer_of_theirs_would():
    """Uniform in +-1 / sqrt(d), as nn.Linear's; B at zero."""
    dit = generator()
    lora.add(dit, 16)
    A = torch.cat([p.flatten() for name, p in dit.named_parameters() if name.endswith("lora_A.weight")])
    assert A.abs().max() <= dit.config["dim"] ** -0.5 < 1.01 * A.abs().max()
    assert not any(p.any() for name, p in dit.named_parameters() if name.endswith("lora_B.weight"))


def test_a_merged_weight_is_made_where_the_adapters_are():
    """On a GPU a frozen weight waits in bfloat16, and is read again from its file, on the CPU."""
    A, B = torch.randn(2, 4, device="meta"), torch.randn(4, 2, device="meta")
    W = Later((4, 4), torch.float32, lambda: torch.ones(4, 4, dtype=torch.bfloat16))
    made = lora.merge({"x.weight": W}, {"x": (A, B)})["x.weight"].make()
    assert made.is_meta and made.dtype == torch.float32
