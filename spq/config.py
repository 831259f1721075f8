"""SPQConfig: everything a user may choose about a compression, and the three presets.

Not the command line (`cli`), and not what came out of a run (`manifest`, `report`).

Presets
- `default`: SPQ with the weaknesses of the released code repaired: sigma on the `down` factor (one scale per rank
  direction absorbs it exactly), a pair only where it saves bytes by a margin, ranks and widths on a tile, row scales
  everywhere, int8 embedding, contiguous calibration windows without padding.
- `paper`: the rules of the code released with arXiv 2602.18420 (Yao & Gultepe 2026): rank rule with its clamp and
  truncation, the 0.8 rule, the parameter test, sigma in the second factor, `mix_name` granularity (one scale per
  attention matrix or factor), no rounding, float embedding, 8 windows of 128 tokens. Two of its habits are not
  reproduced: calibrating on the text that is evaluated, and padding with EOS without an attention mask. A tied head
  stays the float embedding (the released code quantizes a second copy of it). Its LoRA recovery is left out.
- `int8`: quantization alone, no SVD and no pruning: what SVD and pruning have to beat.
"""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spq.errors import OptionError

PresetName = Literal["default", "paper", "int8"]
Granularity = Literal["channel", "tensor", "mix_name", "mix_percentile", "mix_meanstd"]
SigmaPlacement = Literal["down", "up", "split"]
RankRule = Literal["energy", "released"]


class SPQConfig(BaseModel):
    """Options of one compression; immutable, and stored in the packed folder. Raises ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: PresetName = Field("default", description="preset the options started from")

    variance_threshold: float = Field(
        0.96, gt=0.0, le=1.0, description="share of squared singular values a factor pair keeps; 1 switches SVD off"
    )
    rank_rule: RankRule = Field(
        "energy", description="energy: smallest rank over the threshold; released: with the published code's clamps"
    )
    sigma: SigmaPlacement = Field("down", description="factor that carries the singular values; split: a root in each")
    min_saving: float = Field(
        0.10, ge=0.0, lt=1.0, description="share of a matrix's bytes a factor pair must save, else it stays whole"
    )
    rank_multiple: int | None = Field(
        None, ge=1, description="ranks are rounded up to a multiple of this; auto: by the matrix's smaller side"
    )

    min_prune_ratio: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of MLP neurons removed from the layer with the largest activation"
    )
    max_prune_ratio: float = Field(
        0.05, ge=0.0, lt=1.0, description="share removed from the layer with the smallest activation; 0: no pruning"
    )
    width_multiple: int | None = Field(
        None, ge=1, description="kept MLP widths are rounded up to a multiple of this; auto: by the width"
    )

    quantize: bool = Field(True, description="store int8 weights; otherwise floats in the source's dtype")
    granularity: Granularity = Field("channel", description="which matrices get one scale per row, which a single one")
    quantize_embedding: bool = Field(True, description="store the embedding (and a tied head) as int8 rows")

    calibration_windows: int = Field(32, ge=1, description="number of calibration windows")
    calibration_len: int = Field(512, ge=2, description="tokens per window, at most the model's context")
    seed: int = Field(42, ge=0, description="seed of the choice of windows")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_prune_ratio > self.max_prune_ratio:
            raise ValueError(
                f"min_prune_ratio {self.min_prune_ratio} is above max_prune_ratio {self.max_prune_ratio}; lower it"
            )
        if self.rank_rule == "released" and (self.min_saving != 0.0 or self.rank_multiple != 1):
            raise ValueError(
                f"rank_rule released has its own test and no rounding, but min_saving is {self.min_saving} and "
                f"rank_multiple {self.rank_multiple}; set them to 0 and 1, or use rank_rule energy"
            )
        if self.quantize_embedding and not self.quantize:
            raise ValueError("quantize_embedding without quantize: switch both on or both off")
        return self

    @property
    def uses_svd(self) -> bool:
        """Whether any matrix may become a factor pair."""
        return self.variance_threshold < 1.0

    @property
    def uses_pruning(self) -> bool:
        """Whether activations have to be measured and neurons removed."""
        return self.max_prune_ratio > 0.0

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> SPQConfig:
        """The named preset, with single options replaced.

        `quantize=False` switches the embedding's quantization off too unless that is asked for. Raises OptionError
        for an unknown preset or option and for a value out of range.
        """
        if name not in get_args(PresetName):
            raise OptionError(f"preset {name!r} is none of {', '.join(get_args(PresetName))}")
        values: dict[str, Any] = {"name": name, **_PRESETS[name], **overrides}
        if overrides.get("quantize") is False:
            values["quantize_embedding"] = overrides.get("quantize_embedding", False)
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            given = f" (got {first['input']!r})" if where else ""
            raise OptionError(f"option {where or 'combination'}: {first['msg']}{given}") from error


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "rank_rule": "released",
        "sigma": "up",
        "min_saving": 0.0,
        "rank_multiple": 1,
        "width_multiple": 1,
        "granularity": "mix_name",
        "quantize_embedding": False,
        "calibration_windows": 8,
        "calibration_len": 128,
    },
    "int8": {"variance_threshold": 1.0, "max_prune_ratio": 0.0},
}


def tile_multiple(dim: int, asked: int | None) -> int:
    """What a dimension is rounded up to: the multiple asked for, or the tile that suits its size.

    Kernels work in tiles of 64 (tensor cores) or 8-32 (AVX2), so a rank of 819 costs as much as 832. On small
    matrices a tile of 64 would eat the whole saving: auto takes the largest of 64, 32, 16, 8 that is at most 1/32
    of the dimension (64 from 2048 on), and never less than 8, so that rounding costs about 3 % at worst.
    """
    if asked is not None:
        return asked
    return max((tile for tile in (64, 32, 16) if tile * 32 <= dim), default=8)


def round_up(value: int, multiple: int, limit: int) -> int:
    """The next multiple, but at most `limit`."""
    return min(-(-value // multiple) * multiple, limit)
