"""One decoder layer of a supported family, run on hidden states: what calibration needs and no more.

transformers' own layer classes are used, so that what is measured is the model itself; only one layer exists at a
time. Not for serving (`server.model`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spq.architecture import ModelSpec
from spq.moments import Moments

MICRO_BATCH_TOKENS = 4096

InputName = Literal["attention", "o", "mlp", "down"]
INPUTS: dict[InputName, str] = {  # a matrix that reads each input; q, k, v share one, gate and up another
    "attention": "self_attn.q_proj",
    "o": "self_attn.o_proj",
    "mlp": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
ALL_INPUTS: tuple[InputName, ...] = tuple(INPUTS)


@dataclass(slots=True)
class Observation:
    """What one layer showed: only what was asked for."""

    moments: dict[InputName, Moments]  # on the runner's device
    score: Tensor | None  # float32 [width] on the CPU: mean |up_proj output|, the paper's score of a neuron


class LayerRunner:
    """Builds and runs decoder layers of one model on a device; states go in and out in float32."""

    def __init__(
        self, spec: ModelSpec, window_len: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """`dtype` is that of the layers' weights."""
        family = spec.architecture.removesuffix("ForCausalLM")
        module = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
        self._spec = spec
        self._device = device
        self._dtype = dtype
        self._config: Any = copy.deepcopy(spec.config)
        self._config._attn_implementation = "sdpa"
        self._layer_class: type[nn.Module] = getattr(module, f"{family}DecoderLayer")
        rotary = getattr(module, f"{family}RotaryEmbedding")(self._config).to(device)
        positions = torch.arange(window_len, device=device)[None]
        probe = torch.zeros((), dtype=dtype, device=device)
        self._cos_sin: tuple[Tensor, Tensor] = rotary(probe, positions)  # each [1, window_len, head_dim]
        self._positions = positions

    def build(self, layer: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The layer with these tensors (names inside the layer, float32, on the device); nothing is copied.

        Biases that the family does not have are added.
        """
        with torch.device("meta"):
            module = self._layer_class(self._config, layer)
        for name in state.keys() - module.state_dict().keys():
            owner, _, part = name.rpartition(".")
            if part == "bias":
                module.get_submodule(owner).register_parameter(part, nn.Parameter(state[name], requires_grad=False))
        module.load_state_dict(dict(state), strict=True, assign=True)
        return module.eval()

    @torch.no_grad()
    def run(
        self,
        layer: int,
        module: nn.Module,
        hidden: Tensor,
        observe: Collection[Literal[InputName, "score"]] = (),
    ) -> Observation:
        """Run hidden [windows, len, hidden] float32 through the layer in place; returns what `observe` names.

        Windows go through in micro-batches of at most 4,096 tokens (or one window). Memory beyond that: per observed
        input of n channels 8 n^2 bytes until the observation is dropped and 4 n^2 in passing (`Moments`); for
        LLaMA-2-7B 0.13 GB for each of attention, o and mlp, and 0.97 GB (+ 0.48 in passing) for down. An input that
        is not named costs nothing.
        """
        windows, length = hidden.shape[:2]
        step = max(1, MICRO_BATCH_TOKENS // length)
        moments: dict[InputName, Moments] = {}
        total: Tensor = torch.zeros(1, dtype=torch.float64, device=self._device)

        def collect(_module: nn.Module, _args: Any, output: Tensor) -> None:
            nonlocal total
            total = total + output.abs().sum(dim=(0, 1), dtype=torch.float64)

        with ExitStack() as hooks:
            for name in get_args(InputName):
                if name in observe:
                    reader: Any = module.get_submodule(INPUTS[name])
                    moments[name] = Moments(reader.in_features, self._device)
                    hooks.callback(reader.register_forward_pre_hook(_adder(moments[name])).remove)
            if "score" in observe:
                hooks.callback(module.get_submodule("mlp.up_proj").register_forward_hook(collect).remove)
            for start in range(0, windows, step):
                piece = hidden[start : start + step].to(self._device, self._dtype)
                result = module(
                    piece,
                    attention_mask=self._mask(layer, length),
                    position_ids=self._positions,
                    position_embeddings=self._cos_sin,
                    use_cache=False,
                )
                hidden[start : start + step] = result
        score = (total / (windows * length)).float().cpu() if "score" in observe else None
        return Observation(moments, score)

    def _mask(self, layer: int, length: int) -> Tensor | None:
        """Additive mask [1, 1, len, len] where a sliding window cuts in; None lets attention be plainly causal."""
        window = self._spec.windows[layer]
        if window is None or window >= length:
            return None
        distance = self._positions[0][:, None] - self._positions[0][None, :]
        visible = (distance >= 0) & (distance < window)
        return torch.where(visible, 0.0, float("-inf")).to(self._dtype)[None, None]


def _adder(moments: Moments) -> Callable[[nn.Module, Any], None]:
    def add(_module: nn.Module, args: Any) -> None:
        moments.add(args[0])

    return add
