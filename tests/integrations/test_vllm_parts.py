"""The parts of the vLLM plugin that need no vLLM: splitting matrices by ranks, taking tensors in, products by name."""

from __future__ import annotations

import itertools
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spq_vllm import products
from spq_vllm.arrival import Arrival
from spq_vllm.products import Product, float32_default
from spq_vllm.shards import even_cut, head_cut, take_columns, take_rows, take_table, width_cut

from kernels.gpu.check_data import Maker
from kernels.weights import CorrectedWeight, LinearWeight, LowRankWeight
from spq.checkpoint import open_model
from spq.errors import PackedFormatError
from spq.layout import module_has_bias
from tests.integrations.mixes import make_mix
from tests.sources import ROOT

OUT, IN = 96, 80
CPU = torch.device("cpu")
KINDS = ["dense", "int8", "int4", "int4-zero", "pair", "int4-pair", "corrected", "int4-corrected"]
CUTS = [((0, 80),), ((0, 40), (40, 80)), ((0, 32), (32, 34), (34, 80)), ((0, 66), (66, 78), (78, 80))]


def made(kind: str, out: int = OUT, inputs: int = IN) -> LinearWeight:
    """A matrix with a bias."""
    make = Maker(CPU)
    leaf = {
        "dense": lambda: make.dense(out, inputs, torch.float32, bias=True),
        "int8": lambda: make.int8(out, inputs, bias=True),
        "int4": lambda: make.int4(out, inputs, 32, bias=True),
        "int4-zero": lambda: make.int4(out, inputs, 32, symmetric=False, bias=True),
    }
    if kind in leaf:
        return leaf[kind]()
    if kind == "pair":
        return make.low_rank(out, inputs, 11, bias=True)
    if kind == "int4-pair":
        return LowRankWeight(make.int4(30, inputs, 32, False), make.int4(out, 30, 32, False, bias=True))
    main = make.int4(out, inputs, 32, bias=True) if kind == "int4-corrected" else make.int8(out, inputs, bias=True)
    return CorrectedWeight(main, LowRankWeight(make.int4(6, inputs, 32), make.int4(out, 6, 32)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_of_all_ranks_are_the_matrix(kind: str, ranks: int) -> None:
    weight = made(kind)
    parts = [take_rows(weight, even_cut(OUT, rank, ranks)) for rank in range(ranks)]
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())
    assert torch.equal(torch.cat([part.bias for part in parts]), weight.bias)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", CUTS)
def test_products_of_columns_of_all_ranks_add_up(kind: str, cuts: tuple[tuple[int, int], ...]) -> None:
    weight = made(kind)
    x = torch.randn(3, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [take_columns(weight, cut, with_bias=rank == 0) for rank, cut in enumerate(cuts)]
    total = sum(x[:, a:b] @ part.dequantize().double().T for part, (a, b) in zip(parts, cuts, strict=True))
    assert [part.shape for part in parts] == [(OUT, stop - start) for start, stop in cuts]
    torch.testing.assert_close(total, x @ weight.dequantize().double().T, rtol=0, atol=1e-5)  # pairs: float32 products
    assert [part.bias is not None for part in parts] == [True] + [False] * (len(cuts) - 1)


def test_an_int4_matrix_is_not_cut_inside_a_byte() -> None:
    with pytest.raises(ValueError, match="middle of a byte"):
        take_columns(made("int4"), (33, 80), with_bias=False)


def test_heads_of_keys_are_shared_where_ranks_outnumber_them() -> None:
    assert [head_cut(8, 32, rank, 4) for rank in range(4)] == [(0, 64), (64, 128), (128, 192), (192, 256)]
    assert [head_cut(2, 32, rank, 4) for rank in range(4)] == [(0, 32), (0, 32), (32, 64), (32, 64)]
    with pytest.raises(ValueError, match="2 heads cannot be shared out among 3 ranks"):
        head_cut(2, 32, 0, 3)
    with pytest.raises(ValueError, match="equal parts"):
        head_cut(3, 32, 0, 2)


@pytest.mark.parametrize(
    ("width", "ranks", "group"), [(10999, 4, None), (10999, 4, 128), (496, 2, 128), (70, 8, 32), (6, 3, 4)]
)
def test_any_width_is_shared_out_whole_and_in_order(width: int, ranks: int, group: int | None) -> None:
    cuts = [width_cut(width, rank, ranks, group) for rank in range(ranks)]
    assert cuts[0][0] == 0 and cuts[-1][1] == width
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert all(start < stop and start % 2 == 0 for start, stop in cuts)
    if width >= (group or 32) * ranks:
        assert all(start % (group or 32) == 0 for start, _ in cuts)


def test_an_mlp_can_be_too_narrow() -> None:
    with pytest.raises(ValueError, match="5 neurons is too narrow for 3 ranks"):
        width_cut(5, 0, 3, None)


@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "int4-zero"])
def test_a_vocabulary_is_filled_up_with_zeros(kind: str) -> None:
    table = made(kind)
    table.bias = None
    parts = [take_table(table, (start, start + 40), 40) for start in (0, 40, 80, 120)]
    rows = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(rows[:OUT], table.dequantize()) and rows.shape == (160, IN)
    assert not rows[OUT:].any()


@pytest.fixture(scope="module", params=["raw", "zstd"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mix(tmp_path_factory.mktemp("mix"), "llama-bias", coded=request.param == "zstd")


def test_tensors_in_any_order_are_the_matrices_of_the_folder(packed: Path) -> None:
    source, tensors = open_model(packed), load_file(packed / "model.safetensors")
    assert source.manifest is not None
    for module, plan in source.manifest.modules.items():
        arrival = Arrival(module, plan, module_has_bias(source.spec, module))
        names = [name for name in reversed(tensors) if name.startswith(f"{module}.")]
        assert arrival.missing == sorted(names)
        with pytest.raises(PackedFormatError, match=r"missing: model|missing: lm_head"):
            arrival.weight()
        for name in names:
            arrival.take(name.removeprefix(f"{module}."), tensors[name])
        weight, expected = arrival.weight(), source.linear(module)
        assert type(weight) is type(expected) and torch.equal(weight.dequantize(), expected.dequantize())
        assert (weight.bias is None) == (expected.bias is None)
        assert weight.bias is None or torch.equal(weight.bias, expected.bias)


def test_what_the_manifest_does_not_say_is_refused(packed: Path) -> None:
    source = open_model(packed)
    assert source.manifest is not None
    module = "model.layers.0.self_attn.k_proj"
    arrival = Arrival(module, source.manifest.modules[module], True)
    with pytest.raises(PackedFormatError, match=r"k_proj\.g_idx is not in the manifest"):
        arrival.take("g_idx", torch.zeros(1))
    with pytest.raises(PackedFormatError, match=r"k_proj\.scale is \[3\], should be \[64\]"):
        arrival.take("scale", torch.zeros(3))
    with pytest.raises(PackedFormatError, match=r"k_proj\.scale is torch.float16, should be F32"):
        arrival.take("scale", torch.zeros(64, dtype=torch.float16))
    with pytest.raises(PackedFormatError, match=r"k_proj\.bias is torch.int8, should be float"):
        arrival.take("bias", torch.zeros(64, dtype=torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_stand_side_by_side_filled_up_with_zeros(dtype: torch.dtype) -> None:
    weights = [made("pair", 20), made("int8", 20), made("int4-corrected", 33)]
    product = Product("parts.side", dtype)
    product.fill(weights, [32, 20, 48], CPU)
    assert product.columns == 100 and product.nbytes > 0
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    compiled = torch.compile(
        lambda x: products.multiply(x, product.name, product.columns) * 2, backend="eager", fullgraph=True
    )
    for y in (products.multiply(x, product.name, product.columns), compiled(x) / 2):
        assert y.dtype == dtype and y.shape == (2, 3, 100)
        for weight, start, stop in zip(weights, (0, 32, 52), (32, 52, 100), strict=True):
            rows, exact = weight.shape[0], x.double() @ weight.dequantize().double().T + weight.bias.double()
            tolerance = 2e-3 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(y[..., start : start + rows].double(), exact, rtol=tolerance, atol=tolerance)
            assert not y[..., start + rows : stop].any()


@pytest.mark.parametrize("kind", ["dense", "int8", "int4-zero"])
def test_a_table_is_looked_up_and_multiplied_with(kind: str) -> None:
    table = made(kind)
    table.bias = None
    product = Product("parts.table", torch.float32)
    product.fill_table(table, True, CPU)
    ids = torch.tensor([[3, 95], [0, 3]])
    assert torch.allclose(products.embed(ids, product.name, IN, torch.float32), table.dequantize()[ids], atol=1e-6)
    x = torch.randn(2, IN, generator=torch.Generator().manual_seed(3))
    y = products.multiply(x, product.name, product.columns)
    torch.testing.assert_close(y, x @ table.dequantize().T, rtol=2e-3, atol=2e-3)


def test_the_kernels_of_a_gpu_are_given_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one in Triton's interpreter: parts of a matrix, rows of an input that lie apart, a vocabulary."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    triton_ops = pytest.importorskip("kernels.gpu.backend").TritonOps(device, torch.float16)
    monkeypatch.setattr(products, "ops_on", lambda *_: triton_ops)
    weights = [take_columns(made(kind), (16, 64), with_bias=True) for kind in ("int8", "int4-pair", "int4-corrected")]
    product = Product("parts.gpu", torch.float16)
    product.fill(weights, [OUT, 112, OUT], device)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(4)).half()[:, :48]
    y = products.multiply(x.to(device), product.name, product.columns)
    assert y.dtype == torch.float16 and y.is_contiguous()
    for weight, start in zip(weights, (0, OUT, OUT + 112), strict=True):
        exact = x.float() @ weight.dequantize().T + weight.bias
        torch.testing.assert_close(y[:, start : start + OUT].float().cpu(), exact, rtol=2e-2, atol=2e-2)
    assert not y[:, 2 * OUT : OUT + 112].any()

    table = Product("parts.gpu.table", torch.float16)
    rows = made("int8")
    rows.bias = None
    table.fill_table(take_table(rows, (64, 128), 64), True, device)
    ids = torch.tensor([0, 31, 40], device=device)  # the last fills the vocabulary up
    found = products.embed(ids, table.name, IN, torch.float16).float().cpu()
    torch.testing.assert_close(found[:2], rows.dequantize()[[64, 95]], rtol=2e-3, atol=2e-3)
    assert not found[2].any()
    assert products.multiply(torch.ones(1, IN, device=device).half(), table.name, table.columns).shape == (1, 64)


def test_two_models_in_one_process_have_weights_of_their_own() -> None:
    first, second = Product("twice", torch.float32), Product("twice", torch.float32)
    first.fill([made("int8")], [OUT], CPU)
    second.fill([made("dense")], [OUT], CPU)
    x = torch.ones(1, IN)
    assert not torch.equal(products.multiply(x, first.name, OUT), products.multiply(x, second.name, OUT))


def test_weights_are_prepared_in_float32_whatever_the_default() -> None:
    weight = made("int8")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with float32_default():
            assert torch.empty(0).dtype == torch.float32
        product = Product("default", torch.bfloat16)
        product.fill([weight], [OUT], CPU)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    y = products.multiply(torch.ones(1, IN, dtype=torch.bfloat16), product.name, OUT)
    torch.testing.assert_close(y.float()[0], weight.dequantize().sum(1) + weight.bias, rtol=1e-2, atol=1e-2)


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="device 'xpu'"):
        products.ops_on("xpu", torch.float16)


def test_the_entry_point_is_there_and_imports_no_vllm() -> None:
    project = tomllib.loads((ROOT / "integrations" / "vllm" / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["spq"].partition(":")
    assert callable(getattr(import_module(module), function))
    pins = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert all(pin in pins for pin in project["dependencies"])
