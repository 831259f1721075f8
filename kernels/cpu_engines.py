"""Int8 products on CPUs: the integer GEMMs of torch, and which of them this machine may use.

Not matrices or layers (`cpu_linear`). torch has fast int8 x int8 products on x86, but none that keeps activations
precise, so a row of activations is written with two int8 digits ("two-digit activations"):

    a = max|x|, step = a / D, u = x / step, hi = round(u), lo = round(2 D (u - hi)), x ~ step (hi + lo / (2 D))

and both digits go through one int8 GEMM as separate rows. |hi|, |lo| <= D, sums are exact in int32, and a row's
result depends on that row alone, bit for bit. The digits miss u by at most 1 / (4 D), so with int8 weights q and row
scale s an output differs from the exact product by at most

    a s sum|q| (1 / (4 D^2) + 2^-20),

where 2^-20 covers sixteen float32 roundings (step, division, three products, one sum, int32 to float32).

D is 127 with VNNI. Without it the CPU adds pairs of uint8 x int8 products in 16 bits with silent saturation
(vpmaddubsw: 2 * 255 * 127 > 32767), and D must be 63. Measured on an AMD Zen 3 (AVX2, no VNNI), all weights and
digits at their limit: fbgemm and oneDNN are both 99% off with D = 127 and exact with D = 63.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

ROUNDING = 2.0**-20


class Engine(Protocol):
    """An integer GEMM: digits [M, in] x packed int8 [out, in] -> float32 [M, out]."""

    name: str
    digit: int  # D: largest digit it multiplies without saturation

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        """Lay out qweight int8 [out, in] with scale float32 [out]."""
        ...

    def multiply(self, digits: Tensor, packed: Any) -> Tensor:
        """digits float32 [M, in], rounded here to integers in [-D, D] -> scale * (digits qweight^T)."""
        ...

    def packed_nbytes(self, rows: int, columns: int) -> int:
        """Bytes resident for a packed [rows, columns] matrix, scales included."""
        ...


class Fbgemm:
    """torch's "x86" quantized engine: the fastest here up to 4 rows, but it pads K to its block of 512."""

    name = "fbgemm"

    def __init__(self, digit: int) -> None:
        self.digit = digit
        self._linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def pack(self, qweight: Tensor, scale: Tensor) -> Any:
        """Raises RuntimeError where this torch was built without fbgemm."""
        zeros = torch.zeros(qweight.shape[0], dtype=torch.long)
        with _quantized_engine("fbgemm"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # creating a quantized tensor warns of a future removal
            weight = torch._make_per_channel_quantized_tensor(qweight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(weight, None)

    def multiply(self, digits: Tensor, packed: Any) -> Tensor:
        """See Engine."""
        result: Tensor = self._linear(digits, 1.0, self.digit + 1, packed)
        return result

    def packed_nbytes(self, rows: int, columns: int) -> int:
        """Blocks of 512 x 8 on AVX2, of up to 512 x 48 on AVX512 (so there an upper bound); then column sums, scales
        and zero points of 4 bytes."""
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        return round_up(columns, 512) * round_up(rows, 48 if wide else 8) + 12 * rows


class Onednn:
    """oneDNN's quantized linear: no padding to speak of; slower for few rows, equal from 16 on."""

    name = "onednn"

    def __init__(self, digit: int) -> None:
        self.digit = digit
        self._linear = torch.ops.onednn.qlinear_pointwise.default

    def pack(self, qweight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raises RuntimeError where this torch was built without oneDNN."""
        zeros = torch.zeros(qweight.shape[0], dtype=torch.long)
        return torch.ops.onednn.qlinear_prepack(qweight.contiguous(), None), scale, zeros

    def multiply(self, digits: Tensor, packed: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """See Engine; `digits` is overwritten."""
        weight, scale, zeros = packed
        offset = self.digit + 1
        unsigned = digits.add_(offset).round_().to(torch.uint8)
        result: Tensor = self._linear(
            unsigned, 1.0, offset, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    def packed_nbytes(self, rows: int, columns: int) -> int:
        """K to a multiple of 4, rows to 64 (an upper bound); scales of 4 and zero points of 8 bytes."""
        return round_up(columns, 4) * round_up(rows, 64) + 12 * rows


def two_digit_product(x: Tensor, packed: Any, engine: Engine) -> Tensor:
    """x float32 [M, in] times packed int8 [out, in] -> float32 [M, out]; the module's docstring says how exact."""
    rows, columns = x.shape
    step = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30).mul_(1 / engine.digit)  # [M, 1]
    digits = torch.empty(2 * rows, columns)
    high, low = digits[:rows], digits[rows:]
    torch.div(x, step, out=low)
    torch.round(low, out=high)
    low.sub_(high).mul_(2 * engine.digit)
    y = engine.multiply(digits, packed)
    return y[:rows].add_(y[rows:], alpha=0.5 / engine.digit).mul_(step)


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The engines that passed the self-test, best first, and what became of the others."""

    engines: tuple[Engine, ...]
    reason: str


@functools.cache
def machine_choice() -> EngineChoice:
    """What this machine may use, tested once per process. Order from measurements: see `choose`."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    candidates: list[Engine] = []
    for kind in (Fbgemm, Onednn):
        if kind.name in torch.backends.quantized.supported_engines:
            with contextlib.suppress(AttributeError):  # a torch without the operator
                candidates += [kind(digit) for digit in ((127, 63) if vnni else (63,))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine the barriers of many small products cost 20 times the products
    try:
        return choose(candidates)
    finally:
        torch.set_num_threads(threads)


def choose(candidates: Sequence[Engine]) -> EngineChoice:
    """Keep, in the given order, the first candidate of each name whose worst error is within its bound.

    The order is fixed because it did not depend on the machine. Zen 3, 1 thread, us for 4096 x 4096 at 1 / 4 / 16 /
    64 rows: fbgemm 758 / 1808 / 6732 / 27016, oneDNN 4292 / 5417 / 10215 / 28288, float32 F.linear 2416 / 8092 /
    12323 / 28346. Zen 4 (VNNI): fbgemm 706 / 910 / 3116, oneDNN 1506 / 1411 / 3257.
    """
    kept: list[Engine] = []
    notes: list[str] = []
    for engine in candidates:
        if any(engine.name == other.name for other in kept):
            continue
        label = f"{engine.name} with digits to {engine.digit}"
        try:
            error = worst_error(engine)
        except (RuntimeError, AttributeError) as failure:
            notes.append(f"{label}: not available ({str(failure).splitlines()[0]})")
            continue
        if error <= 1:
            kept.append(engine)
        notes.append(f"{label}: {'passed' if error <= 1 else 'WRONG'}, error {error:.2g} of its bound")
    if not kept:
        notes.append("weights are widened to float32 at each use")
    return EngineChoice(tuple(kept), "; ".join(notes))


def worst_error(engine: Engine) -> float:
    """Largest error of an engine over its derived bound, on inputs at full range and on odd random shapes.

    Saturation shows only where neighbouring products are large and of one sign, hence the constant matrices.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, columns, out in ((1, 1, 1), (1, 130, 17), (2, 1000, 9), (3, 64, 65), (7, 517, 50), (150, 600, 31)):
        random = torch.randint(-127, 128, (out, columns), generator=generator, dtype=torch.int8)
        extreme = torch.full((out, columns), 127, dtype=torch.int8)
        extreme[1::2] = -127
        scale = torch.rand(out, generator=generator) + 0.5
        full = torch.ones(rows, columns)
        inputs = (full, -full, torch.randn(rows, columns, generator=generator))
        for qweight in (random, extreme):
            packed = engine.pack(qweight, scale)
            for x in inputs:
                exact = x.double() @ qweight.double().t() * scale.double()
                bound = digit_bound(x, qweight, scale, engine.digit)
                error = (two_digit_product(x, packed, engine) - exact).abs() / bound
                worst = max(worst, error.max().nan_to_num(torch.inf).item())
    return worst


def digit_bound(x: Tensor, qweight: Tensor, scale: Tensor, digit: int) -> Tensor:
    """float64 [M, out]: the most a two-digit product may differ from the exact one (module docstring)."""
    largest = x.abs().amax(-1, keepdim=True).double().clamp_min(1e-30)
    weights = qweight.double().abs().sum(-1) * scale.double().abs()
    return largest * weights * (0.25 / digit**2 + ROUNDING) + torch.finfo(torch.float32).tiny


@contextlib.contextmanager
def _quantized_engine(name: str) -> Iterator[None]:
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is no less than the value."""
    return -(-value // multiple) * multiple
