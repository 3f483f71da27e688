"""load_pretrained: names, permuted rows, ties, shapes, tiles on devices, meta tensors; what the report says."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from helpers import same_bits
from safetensors.torch import save_file
from torch import Tensor, nn
from weights_helpers import Llama, decoded, write_gguf, write_llama

from lightning_lrtt import LRTT, LRTTConfig, convert_to_digital, convert_to_lrtt, devices
from lightning_lrtt.export import digital_state_dict, export_checkpoint
from lightning_lrtt.nn import LRTTConv2d, LRTTLinear, find_tiles
from lightning_lrtt.nn.average import average_effective_weights
from lightning_lrtt.weights import (
    CheckpointChangedError,
    CheckpointMismatchError,
    LazyCheckpoint,
    Pretrained,
    Transform,
    load_pretrained,
)
from lightning_lrtt.weights.inspect import describe

DIGITAL = LRTTConfig(rank=2)
TIGHT = LRTTConfig(rank=2, reinit_gain=1.0, visible_device=devices.Ideal(w_max=0.125, w_min=-0.125))


def effective(module: nn.Module, name: str) -> Tensor:
    """What the layer multiplies with."""
    owner = module.get_submodule(name.rpartition(".")[0])
    return (
        owner.effective_weight()
        if name.endswith("weight") and hasattr(owner, "effective_weight")
        else getattr(owner, name.rpartition(".")[2])
    )


def assert_holds(module: nn.Module, expected: dict[str, Tensor], prefix: str = "") -> None:
    """Every weight, to the bit (but for the sign of zero: C + alpha A B makes 0 of -0)."""
    for name, value in expected.items():
        assert torch.equal(effective(module, prefix + name), value), name


class Wrapped(nn.Module):
    """A model under a name, as a LightningModule holds it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.net = Llama(**kwargs)


# ------------------------------------------------------------------ llama


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("config", [None, DIGITAL, TIGHT], ids=["plain", "tiles", "bounded"])
@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16], ids=lambda kind: kind.name)
def test_a_llama_file_loads_by_its_architecture(
    tmp_path: Path, kind: Kind, config: LRTTConfig | None, meta: bool
) -> None:
    """q and k are unpermuted; a prefix of the module's names does not matter; weights are those of gguf.quants."""
    expected = write_llama(tmp_path / "a.gguf", kind=kind)
    with torch.device("meta" if meta else "cpu"):
        module = Wrapped()
    if config is not None:
        convert_to_lrtt(module, config)
    report = load_pretrained(module, tmp_path / "a.gguf")
    assert_holds(module, expected, "net.")
    assert set(report.loaded) == {"net." + name for name in expected}
    assert not report.missing
    assert not report.unexpected
    assert not report.mismatched
    assert report.bytes == sum(t.nbytes for t in LazyCheckpoint.open(tmp_path / "a.gguf").values())
    assert report.seconds > 0
    assert "rows of 2 heads unpermuted" in report.converted["net.model.layers.1.self_attn.k_proj.weight"]
    assert "net.model.norm.weight" not in report.converted  # float32 there and here
    assert not any(t.is_meta for t in (*module.parameters(), *module.buffers()))


def test_permutation_is_that_of_the_converter() -> None:
    stub = SimpleNamespace(shape=(12, 4), name="q")
    rows = Transform(heads=2).rows(stub)
    assert rows is not None
    stored = torch.tensor([0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11])  # LlamaModel.permute of 0..11 with 2 heads
    assert torch.empty(12, dtype=torch.int64).index_copy_(0, rows, stored).tolist() == list(range(12))
    with pytest.raises(ValueError, match="whole pairs of 4 heads, got 12"):
        Transform(heads=4).rows(stub)


def test_agreement_with_transformers(tmp_path: Path) -> None:
    """The same file through an independent loader: transformers' GGUF import of a Llama."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    module = transformers.LlamaForCausalLM(config)
    rng, names = np.random.default_rng(0), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for name, parameter in module.named_parameters():
        source = names.get_name(name, (".weight",))
        values = rng.standard_normal(tuple(parameter.shape)).astype(np.float32)
        tensors[source] = (values, Kind.Q8_0 if values.ndim == 2 else Kind.F32)
    path = write_gguf(
        tmp_path / "a.gguf",
        tensors,
        llama__block_count=2,
        llama__attention__head_count=4,
        llama__attention__head_count_kv=2,
        llama__embedding_length=64,
    )
    load_pretrained(module, path)
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    processor = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2})
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for name, parameter in module.named_parameters():
        source = names.get_name(name, (".weight",))
        theirs = processor.process(
            gguf.dequantize(reader[source].data, reader[source].tensor_type), name=source
        ).weights
        assert same_bits(parameter.detach(), torch.from_numpy(np.array(theirs, dtype=np.float32))), name


def test_head_counts_by_layer_and_without_groups(tmp_path: Path) -> None:
    expected = write_llama(tmp_path / "a.gguf")
    again = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {t.name: (np.array(gguf.dequantize(t.data, t.tensor_type)), Kind.F32) for t in again.tensors}
    path = write_gguf(
        tmp_path / "b.gguf",
        tensors,
        llama__block_count=2,
        llama__attention__head_count=[4, 4],
        llama__attention__head_count_kv=[2, 2],
    )
    module = Llama()
    load_pretrained(module, path)
    assert_holds(module, expected)
    path = write_gguf(tmp_path / "c.gguf", tensors, llama__block_count=2)
    with pytest.raises(ValueError, match=r"metadata 'llama.attention.head_count' must be the number of heads"):
        load_pretrained(Llama(), path)


def test_ties(tmp_path: Path) -> None:
    """A file without a head, for modules with and without one; a file with a head for a tied module is refused."""
    expected = write_llama(tmp_path / "tied.gguf", head=False)
    for tied in (True, False):
        for device in ("cpu", "meta"):
            with torch.device(device):
                module = Llama(tied=tied)
            load_pretrained(module, tmp_path / "tied.gguf")
            assert_holds(module, expected)
            assert (module.lm_head.weight is module.model.embed_tokens.weight) == tied
    write_llama(tmp_path / "own.gguf")
    with pytest.raises(CheckpointMismatchError, match=r"unexpected in the file \(1\): output.weight"):
        load_pretrained(Llama(tied=True), tmp_path / "own.gguf")


def test_the_names_of_a_tied_parameter_may_all_be_in_the_file(tmp_path: Path) -> None:
    """Regression: `lrtt export` writes them all; strict loading refused what the first one did not use."""
    source = convert_to_lrtt(Llama(tied=True), DIGITAL)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    written = export_checkpoint(tmp_path / "a.pt", tmp_path / "a.safetensors")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(written)
    for names in ("auto", {}, lambda name: name):
        module = Llama(tied=True)
        report = load_pretrained(module, tmp_path / "a.safetensors", names=names)
        assert not report.unexpected
        assert same_bits(module.lm_head.weight.detach(), source.lm_head.weight.detach())
    with LazyCheckpoint.open(tmp_path / "a.safetensors") as checkpoint:
        page = describe(checkpoint, Llama(tied=True))
        assert page.startswith("problems: none\n")
        assert "model.embed_tokens.weight (a copy)" in page
        state = {name: tensor.load() for name, tensor in checkpoint.items()}
    for other in (state["lm_head.weight"] + 1, state["lm_head.weight"].half(), state["lm_head.weight"][:9]):
        save_file(state | {"lm_head.weight": other.contiguous()}, tmp_path / "b.safetensors")
        with pytest.raises(CheckpointMismatchError, match=r"unexpected in the file \(1\): lm_head.weight"):
            load_pretrained(Llama(tied=True), tmp_path / "b.safetensors")


def test_a_shared_source_is_decoded_once_within_the_budget(tmp_path: Path) -> None:
    expected = write_llama(tmp_path / "tied.gguf", head=False)
    for budget, loads in ((0, 0), (1 << 20, 1)):
        with LazyCheckpoint.open(tmp_path / "tied.gguf", cache_bytes=budget) as checkpoint:
            module = Llama()
            load_pretrained(module, checkpoint)
            assert_holds(module, expected)
            assert checkpoint.flight.counts["loads"] == loads
            assert checkpoint.flight.counts["hits"] == loads


def test_an_unknown_architecture_is_refused_unless_told(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"blk.0.w": (np.ones((2, 32), np.float32), Kind.F32)}, arch="mamba")
    module = nn.Linear(32, 2, bias=False)
    with pytest.raises(ValueError, match=r"architecture must be one whose value transforms are known .* got 'mamba'"):
        load_pretrained(module, path, names={"weight": "blk.0.w"})
    load_pretrained(module, path, names={"weight": "blk.0.w"}, transforms={})
    assert module.weight.eq(1).all()


def test_transforms_of_the_user_and_of_gpt2(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", {"w": (stored, Kind.Q8_0), "n": (stored[0], Kind.F32)})
    expected = decoded(gguf.quantize(stored, Kind.Q8_0), Kind.Q8_0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.n = nn.Parameter(torch.empty(32, 3)), nn.Parameter(torch.empty(32))

    module = Both()
    report = load_pretrained(module, path, transforms={"w": "transpose", "n": "minus_one"})
    assert same_bits(module.w.detach(), expected.t().contiguous())
    assert same_bits(module.n.detach(), torch.from_numpy(stored[0]) - 1.0)
    assert report.converted == {"w": "Q8_0 to float32, transposed", "n": "-1"}
    with pytest.raises(
        ValueError, match="transforms must be Transform or one of transpose, minus_one, none, got 'turn'"
    ):
        load_pretrained(module, path, transforms={"w": "turn"})
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 1)
    model = transformers.GPT2LMHeadModel(config)
    state = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    tensors = {}
    for name, value in state.items():
        turned = value.t() if "c_" in name and value.dim() == 2 else value
        tensors[names.get_name(name, (".weight", ".bias"))] = (turned.contiguous().numpy(), Kind.F32)
    path = write_gguf(tmp_path / "g.gguf", tensors, arch="gpt2", gpt2__block_count=1)
    for tiles in (False, True):
        model = transformers.GPT2LMHeadModel(config)
        if tiles:
            convert_to_lrtt(model, DIGITAL)
            assert len(find_tiles(model)) == 4
        load_pretrained(model, path)
        convert_to_digital(model)
        for name, value in model.named_parameters():
            assert same_bits(value.detach(), state[name]), name


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ({"wieght": "transpose"}, "must be given for parameters, but 'wieght' matches none of 2, such as 'w', 'n'"),
        ({"w": "transpose", "layers.*": "none"}, r"but 'layers.\*' matches none of 2"),
        ({"layers.*": "turn"}, r"must be Transform or one of .*, got 'turn' for 'layers.\*'"),
        ({"w": None}, "must be Transform or one of .*, got None for 'w'"),
    ],
)
def test_transforms_that_would_do_nothing(transforms: Any, message: str, tmp_path: Path) -> None:
    """Regression: a mistyped pattern was ignored, and with it a mistyped name."""
    save_file({"w": torch.ones(3, 3), "n": torch.ones(3)}, tmp_path / "a.safetensors")
    module = nn.ParameterDict({"w": torch.zeros(3, 3), "n": torch.zeros(3)})
    with pytest.raises(ValueError, match=message):
        load_pretrained(module, tmp_path / "a.safetensors", transforms=transforms)
    assert not module["w"].any()


def test_a_transform_may_be_given_by_any_name_of_a_tied_parameter(tmp_path: Path) -> None:
    tied = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = tied["a"].weight
    stored = torch.randn(3, 3)
    save_file({"a.weight": stored}, tmp_path / "a.safetensors")
    for name in ("a.weight", "b.weight"):
        load_pretrained(tied, tmp_path / "a.safetensors", transforms={name: "transpose"})
        assert same_bits(tied["a"].weight.detach(), stored.t().contiguous())


# ------------------------------------------------------------------ names and shapes


def two() -> nn.Module:
    """A module with two layers."""
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))


@pytest.fixture
def odd(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file whose names are the module's with ``first``/``second`` for 0 and 1."""
    state = two().state_dict()
    renamed = {name.replace("0.", "first.").replace("1.", "second."): value for name, value in state.items()}
    save_file(renamed, tmp_path / "odd.safetensors")
    return tmp_path / "odd.safetensors", state


NAMES: dict[str, Any] = {
    "dict": {"0.weight": "first.weight", "0.bias": "first.bias", "1.weight": "second.weight"},
    "regex": [[r"^0\.", "first."], [r"^1\.(.*)$", r"second.\1"]],
    "callable": lambda name: name.replace("0.", "first.").replace("1.", "second."),
}


@pytest.mark.parametrize("how", NAMES)
def test_names_by(how: str, odd: tuple[Path, dict[str, Tensor]]) -> None:
    path, state = odd
    module = two()
    load_pretrained(module, path, names=NAMES[how])
    assert_holds(module, state)


def test_names_may_be_rows_of_a_fused_tensor(tmp_path: Path) -> None:
    fused = torch.randn(5, 4)
    save_file({"fused": fused, "1.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    with LazyCheckpoint.open(tmp_path / "a.safetensors", cache_bytes=1 << 20) as checkpoint:
        module = nn.ModuleDict({"0": nn.Linear(4, 3, bias=False), "1": nn.Linear(3, 2, bias=False)})
        load_pretrained(module, checkpoint, names={"0.weight": checkpoint["fused"][1:4]})
        pair = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 2, bias=False)})
        slices = {"a.weight": checkpoint["fused"][:3], "b.weight": checkpoint["fused"][3:]}
        load_pretrained(pair, checkpoint, names=slices, strict=False)
        assert checkpoint.flight.counts["loads"] == 0  # slices share no bytes: nothing is kept for another
    assert same_bits(module["0"].weight.detach(), fused[1:4])
    assert module["1"].weight.eq(1).all()  # what the dict leaves out keeps its name
    assert same_bits(torch.cat([pair["a"].weight, pair["b"].weight]).detach(), fused)


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    save_file(
        {"0.weight": torch.ones(4, 3), "1.weight": torch.ones(2, 3), "old": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    module = two()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CheckpointMismatchError) as caught:
        load_pretrained(module, tmp_path / "a.safetensors")
    said = str(caught.value)
    for part in (
        "missing in the file (1): 0.bias",
        "unexpected in the file (1): old",
        "0.weight: [3, 4] here, [4, 3] in '0.weight'",
        "strict=False",
        "lrtt inspect",
    ):
        assert part in said
    assert all(same_bits(value, before[name]) for name, value in module.state_dict().items())  # nothing was read
    report = load_pretrained(module, tmp_path / "a.safetensors", strict=False)
    assert report.loaded == ("1.weight",)
    assert report.missing == ("0.bias",)
    assert report.unexpected == ("old",)
    assert set(report.mismatched) == {"0.weight"}
    assert module[1].weight.eq(1).all()
    assert same_bits(module[0].weight.detach(), before["0.weight"])


@pytest.mark.parametrize("names", ["exact", ["0"], [["a"]], 5], ids=repr)
def test_names_that_are_none(names: Any, odd: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises((ValueError, TypeError)):
        load_pretrained(two(), odd[0], names=names)


def test_a_file_that_changed_since_it_was_opened(tmp_path: Path, odd: tuple[Path, dict[str, Tensor]]) -> None:
    with LazyCheckpoint.open(odd[0]) as checkpoint:
        with open(odd[0], "ab") as file:
            file.write(b"x")
        with pytest.raises(CheckpointChangedError, match="size was"):
            load_pretrained(two(), checkpoint, names=NAMES["dict"])


def test_buffers_are_filled_where_the_file_has_them(tmp_path: Path) -> None:
    source, module = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    source.running_mean.fill_(2.0)
    source.num_batches_tracked.fill_(7)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    load_pretrained(module, tmp_path / "a.safetensors")
    assert module.running_mean.eq(2).all()
    assert module.num_batches_tracked.item() == 7
    save_file({k: v for k, v in source.state_dict().items() if "running" not in k}, tmp_path / "b.safetensors")
    assert not load_pretrained(module, tmp_path / "b.safetensors").missing
    with torch.device("meta"):
        module = nn.BatchNorm1d(3)
    with pytest.raises(CheckpointMismatchError, match=r"on the meta device must be in .*running_mean, running_var"):
        load_pretrained(module, tmp_path / "b.safetensors", strict=False)


# ------------------------------------------------------------------ tiles


@pytest.mark.parametrize("pulsed", [False, True], ids=["digital", "pulsed"])
def test_a_tile_starts_as_from_a_digital_state_dict(tmp_path: Path, pulsed: bool) -> None:
    """C, A, B, counters: the same bits as load_state_dict of the same values."""
    soft = devices.SoftBounds(dw_min=0.002, w_max=4.0, w_min=-4.0) if pulsed else None
    config = LRTTConfig(rank=2, reinit_gain=1.0, fast_device=soft, visible_device=soft)
    save_file(two().state_dict(), tmp_path / "a.safetensors")
    torch.manual_seed(0)
    one = convert_to_lrtt(two(), config)
    other = copy.deepcopy(one)
    for tile in (*find_tiles(one).values(), *find_tiles(other).values()):
        tile.A.data.fill_(0.5)
    one.load_state_dict({name: t.load() for name, t in LazyCheckpoint.open(tmp_path / "a.safetensors").items()})
    load_pretrained(other, tmp_path / "a.safetensors")
    for name, value in one.state_dict().items():
        assert same_bits(value, other.state_dict()[name]), name


def test_parameters_keep_their_identity(tmp_path: Path) -> None:
    save_file(two().state_dict(), tmp_path / "a.safetensors")
    module = convert_to_lrtt(two(), DIGITAL)
    before = {name: (parameter, parameter.data_ptr()) for name, parameter in module.named_parameters()}
    load_pretrained(module, tmp_path / "a.safetensors")
    for name, parameter in module.named_parameters():
        assert parameter is before[name][0]
        assert parameter.data_ptr() == before[name][1]


@pytest.mark.parametrize("mode", ["progressive", "lazy"])
def test_other_strides(mode: Any, tmp_path: Path) -> None:
    """Regression: a digital convolution in channels_last raised after parameters before it had been overwritten."""

    def layers() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)

    source, module, x = layers(), layers(), torch.randn(2, 3, 8, 8)
    save_file({name: value.contiguous() for name, value in source.state_dict().items()}, tmp_path / "a.safetensors")
    strides = [parameter.stride() for parameter in module.parameters()]
    pretrained = Pretrained(str(tmp_path / "a.safetensors"), mode)
    pretrained.apply(module, torch.device("cpu"))
    if mode == "lazy":
        assert all(parameter.view(-1)[0].isnan() for parameter in (module[0].bias, module[1].bias))
        assert module[0].weight[0, 0, 0, 0].isnan()
    assert same_bits(module(x).detach(), source(x).detach())
    for name, value in module.state_dict().items():
        assert same_bits(value, source.state_dict()[name]), name
    assert [parameter.stride() for parameter in module.parameters()] == strides


def test_convolutions(tmp_path: Path) -> None:
    source = nn.Conv2d(2, 4, 3)
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    tile = LRTTConv2d(2, 4, 3, config=DIGITAL)
    load_pretrained(tile, tmp_path / "a.safetensors")
    assert same_bits(tile.weight.detach(), source.weight.detach())


def test_output_scale(tmp_path: Path) -> None:
    """Weights beyond the device's bounds fit after division by the least power of two; the layer is the digital one."""
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).clamp(-0.9, 0.9)
    weight[0, 0] = 0.9  # / 0.125 = 7.2
    save_file({"weight": weight, "bias": torch.ones(3)}, tmp_path / "a.safetensors")
    tile, digital, x = LRTTLinear(4, 3, config=TIGHT), nn.Linear(4, 3), torch.randn(5, 4)
    report = load_pretrained(tile, tmp_path / "a.safetensors")
    load_pretrained(digital, tmp_path / "a.safetensors")
    assert report.output_scales == {"": 8.0}
    assert report.clipped == {"": 0.0}
    assert same_bits(tile.effective_weight(), weight)
    assert float(tile.matrix.abs().max()) <= 0.125
    torch.testing.assert_close(tile(x), digital(x), rtol=1e-6, atol=1e-6)
    assert same_bits(tile.to_digital().weight.detach(), weight)
    tile = LRTTLinear(4, 3, config=TIGHT)
    report = load_pretrained(tile, tmp_path / "a.safetensors", output_scale=False)
    assert not report.output_scales
    assert report.clipped[""] == int((weight.abs() >= 0.125).sum()) / weight.numel()
    assert same_bits(tile.effective_weight(), weight.clamp(-0.125, 0.125))


def test_no_scale_where_the_weights_fit(tmp_path: Path) -> None:
    save_file({"weight": torch.full((3, 4), 0.125), "bias": torch.ones(3)}, tmp_path / "a.safetensors")
    tile = LRTTLinear(4, 3, config=TIGHT)
    report = load_pretrained(tile, tmp_path / "a.safetensors")
    assert tile.output_scale is None
    assert "output_scale" not in tile.state_dict()
    assert report.clipped == {"": 1.0}  # they stand at the bound


def scaled_tile(tmp_path: Path, config: LRTTConfig = TIGHT) -> LRTTLinear:
    """A tile with an output scale of 8."""
    weight = torch.linspace(-0.9, 0.9, 12).view(3, 4)
    save_file({"weight": weight, "bias": torch.ones(3)}, tmp_path / "a.safetensors")
    tile = LRTTLinear(4, 3, config=config, tile=0)
    load_pretrained(tile, tmp_path / "a.safetensors")
    assert tile.output_scale is not None
    assert tile.output_scale.item() == 8
    return tile


def test_gradients_contain_the_scale(tmp_path: Path) -> None:
    """Against autograd through the dense formula."""
    tile, x = scaled_tile(tmp_path), torch.randn(5, 4)
    tile.A.data.normal_(std=0.1)
    tile(x).square().sum().backward()
    a, b = (t.detach().clone().requires_grad_() for t in (tile.A, tile.B))
    (x @ (8.0 * (tile.matrix + a @ b)).t() + tile.bias.detach()).square().sum().backward()
    torch.testing.assert_close(tile.A.grad, a.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tile.B.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_a_scale_is_saved_loaded_exported_and_dropped(tmp_path: Path) -> None:
    tile = scaled_tile(tmp_path)
    tile.A.data.normal_(std=0.1)
    state = tile.state_dict()
    fresh = LRTTLinear(4, 3, config=TIGHT)
    fresh.load_state_dict(state)
    assert same_bits(fresh.effective_weight(), tile.effective_weight())
    exported = digital_state_dict({"0." + name: value for name, value in state.items()})
    assert same_bits(exported["0.weight"], tile.effective_weight())
    assert set(exported) == {"0.weight", "0.bias"}
    digital = torch.linspace(-0.5, 0.5, 12).view(3, 4)
    tile.load_state_dict({"weight": digital, "bias": torch.zeros(3)})  # a digital checkpoint keeps the scale
    assert same_bits(tile.effective_weight(), digital)
    plain = LRTTLinear(4, 3, config=TIGHT)
    tile.load_state_dict(plain.state_dict())  # an LR-TT checkpoint brings its own, here none
    assert tile.output_scale is None
    assert same_bits(tile.effective_weight(), plain.effective_weight())


def test_averages_of_scaled_tiles(tmp_path: Path) -> None:
    tile = scaled_tile(tmp_path)
    seen = []
    averaged = average_effective_weights(torch.optim.swa_utils.AveragedModel(tile))
    for i in range(3):
        tile.A.data.fill_(0.01 * i)
        seen.append(tile.effective_weight())
        averaged.update_parameters(tile)
    torch.testing.assert_close(averaged.module.effective_weight(), torch.stack(seen).mean(0), rtol=1e-6, atol=1e-6)


def test_training_moves_a_scaled_tile_towards_its_target(tmp_path: Path) -> None:
    tile = scaled_tile(
        tmp_path, LRTTConfig(rank=2, transfer_every=4, visible_device=TIGHT.visible_device, transfer_mode="digital")
    )
    target, losses = torch.randn(3, 4), []
    optimizer = LRTT(tile.parameters(), lr=0.005)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        x = torch.randn(16, 4, generator=generator)
        loss = (tile(x) - x @ (0.8 * target.tanh()).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])  # 0.002 times; without the scale in the gradient far from it


# ------------------------------------------------------------------ logging


def test_loads_are_logged_at_debug_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = write_llama(tmp_path / "a.gguf", head=False)
    with (
        caplog.at_level(logging.DEBUG, "lightning_lrtt"),
        LazyCheckpoint.open(tmp_path / "a.gguf", cache_bytes=1 << 20) as checkpoint,
    ):
        load_pretrained(Llama(), checkpoint)
    said = caplog.text
    assert "opened" in said
    assert f"gguf, {len(expected) - 1} tensors" in said
    assert "loaded blk.0.attn_q.weight [64, 64] Q8_0: 4352 bytes in" in said
    assert "model.norm.weight <- output_norm.weight (as stored)" in said
    assert "miss" in said
    assert "hit" in said
