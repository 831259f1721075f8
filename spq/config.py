"""SPQConfig: everything a user may choose about a compression, and the presets.

Not the command line (`cli`), and not what came out of a run (`manifest`, `report`).

Presets
- `default`: SPQ with the weaknesses of the released code repaired: sigma on the `down` factor (one scale per rank
  direction absorbs it exactly), a pair only where it saves bytes by a margin, ranks and widths on a tile, row scales
  everywhere, int8 embedding, neurons scored by the energy they bring to the output and the kept ones refitted,
  contiguous calibration windows without padding.
- `paper`: the rules of the code released with arXiv 2602.18420 (Yao & Gultepe 2026): rank rule with its clamp and
  truncation, the 0.8 rule, the parameter test, sigma in the second factor, `mix_name` granularity (one scale per
  attention matrix or factor), no rounding, float embedding, 8 windows of 128 tokens. Two of its habits are not
  reproduced: calibrating on the text that is evaluated, and padding with EOS without an attention mask. A tied head
  stays the float embedding (the released code quantizes a second copy of it). Its LoRA recovery is
  `recover_steps`, off unless asked for.
- `int8`, `int4`: quantization alone, no SVD and no pruning: what these have to beat; int4 with error feedback.
- `budget`: rank, width and bits of every matrix are chosen for a number of bytes (`budget`, `ratio`) or a perplexity
  (`target_perplexity`) by measured sensitivities; how each is made: whitened SVD, error feedback, refitted pruning.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from spq.errors import OptionError
from spq.sizes import parse_bytes

PresetName = Literal["default", "paper", "int8", "int4", "budget"]
Granularity = Literal["channel", "tensor", "mix_name", "mix_percentile", "mix_meanstd"]
SigmaPlacement = Literal["down", "up", "split"]
RankRule = Literal["energy", "released"]
Metric = Literal["plain", "whitened"]
PruneScore = Literal["up", "energy"]
Compensation = Literal["none", "bias", "refit"]
Bits = Annotated[Literal[4, 8], BeforeValidator(lambda value: int(value) if isinstance(value, str) else value)]
RECOVER_RANK, RECOVER_LR = 8, 1e-3
Bytes = Annotated[int, BeforeValidator(lambda value: parse_bytes(str(value)))]


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
    svd_metric: Metric = Field(
        "plain", description="error an SVD keeps small: of the weights, or of the outputs on the calibration text"
    )
    svd_last_layers: int | None = Field(
        None,
        ge=1,
        description="only the last so many layers may have factor pairs (partial-layer compression); auto: all",
    )
    svd_residual: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the rank spent on the plain SVD of the whitened SVD's residual"
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

    prune_score: PruneScore = Field(
        "energy",
        description="a neuron's worth: mean |up_proj output|, or energy of down_proj's input times column norm",
    )
    compensation: Compensation = Field(
        "refit",
        description="for dropped neurons: nothing, their mean as a bias, or a least-squares fit of the kept ones",
    )

    quantize: bool = Field(True, description="store integers; otherwise floats in the source's dtype")
    bits: Bits = Field(8, description="bits of the matrices of the layers and of an untied head")
    embedding_bits: Bits = Field(8, description="bits of the embedding (and a tied head)")
    group: int = Field(128, ge=16, multiple_of=16, description="inputs that share a scale at 4 bits")
    symmetric: bool = Field(False, description="4 bits without zero points")
    feedback: bool = Field(False, description="round column by column and pass each error on (GPTQ)")
    correction_rank: int = Field(
        0, ge=0, description="rank of the pair beside each matrix that makes up for rounding and pruning; 0: none"
    )
    granularity: Granularity = Field("channel", description="which matrices get one scale per row, which a single one")
    quantize_embedding: bool = Field(True, description="store the embedding (and a tied head) as int8 rows")

    scaling_alpha: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="input channels are scaled by max|x|^alpha before rounding (double compression)",
    )
    integer_pruning: float = Field(
        0.0, ge=0.0, lt=1.0, description="share of the integers of each matrix set to zero (double compression)"
    )
    coding_loss: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="choose both by matrix: fewest coded bytes with at most this output error; 0: no",
    )
    entropy_coding: bool = Field(False, description="store integers in zstd blocks; decoded when a model is loaded")

    budget: Bytes | None = Field(None, ge=1, description="bytes the packed tensors may take; suffixes KiB, MiB, GiB")
    ratio: float | None = Field(None, gt=0.0, le=1.0, description="the budget as a share of the float16 bytes")
    target_perplexity: float | None = Field(
        None, gt=1.0, description="smallest model whose perplexity on held-out calibration windows is at most this"
    )

    recover_steps: int = Field(
        0, ge=0, description="steps of LoRA training after SVD and pruning, merged before rounding; 0: none"
    )
    recover_rank: int = Field(RECOVER_RANK, ge=1, description="rank of the trained updates")
    recover_lr: float = Field(RECOVER_LR, gt=0.0, le=0.1, description="highest learning rate of the training")

    calibration_windows: int = Field(32, ge=1, description="number of calibration windows")
    calibration_len: int = Field(512, ge=2, description="tokens per window, at most the model's context")
    seed: int = Field(42, ge=0, description="seed of the choice of windows and of the training")

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
        if self.name == "budget" and not self.has_budget:
            raise ValueError("preset budget without a budget; give budget, ratio or target_perplexity")
        if self.quantize_embedding and not self.quantize:
            raise ValueError("quantize_embedding without quantize: switch both on or both off")
        if not self.quantize:
            asked = {
                "bits": self.bits != 8, "feedback": self.feedback, "integer_pruning": self.integer_pruning > 0,
                "entropy_coding": self.entropy_coding, "a budget": self.has_budget, "coding_loss": self.coding_loss > 0,
            }  # fmt: skip
            for what in (name for name, given in asked.items() if given):
                raise ValueError(f"{what} without quantize: there are no integers; switch quantize on")
        if not self.quantize_embedding and self.embedding_bits != 8:
            raise ValueError("embedding_bits without quantize_embedding: switch it on")
        if self.coding_loss > 0:
            self._check_coding_loss()
        if (
            (self.integer_pruning > 0 or self.coding_loss > 0)
            and not self.symmetric
            and 4 in (self.bits, 4 if self.has_budget else 8)
        ):
            asked_for = "coding_loss" if self.coding_loss > 0 else "integer_pruning"
            raise ValueError(f"{asked_for} at 4 bits with zero points: 0 is no common symbol there; set symmetric")
        if self.feedback and self.granularity != "channel":
            raise ValueError(f"feedback with granularity {self.granularity}: only row scales are fed back; use channel")
        if self.svd_residual > 0 and self.svd_metric != "whitened":
            raise ValueError("svd_residual with the plain metric changes nothing (Eckart-Young); use whitened")
        if not self.recover_steps and (self.recover_rank, self.recover_lr) != (RECOVER_RANK, RECOVER_LR):
            raise ValueError("recover_rank or recover_lr without recover_steps: nothing is trained; set recover_steps")
        if self.recover_steps and self.target_perplexity is not None:
            raise ValueError(
                "recover_steps with target_perplexity: what training gains cannot be predicted; give budget or ratio"
            )
        return self._check_budget()

    def _check_budget(self) -> Self:
        given = [name for name in ("budget", "ratio", "target_perplexity") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)}: give one of them")
        if not given:
            return self
        chosen = {
            "variance_threshold": self.uses_svd, "max_prune_ratio": self.uses_pruning, "bits": self.bits != 8,
            "embedding_bits": self.embedding_bits != 8, "correction_rank": self.correction_rank > 0,
            "quantize_embedding": not self.quantize_embedding, "granularity": self.granularity != "channel",
        }  # fmt: skip
        for what in (name for name, clash in chosen.items() if clash):
            raise ValueError(f"{what} is chosen by the allocator where {given[0]} is given; leave it out")
        return self

    def _check_coding_loss(self) -> None:
        clash = {
            "scaling_alpha": self.scaling_alpha > 0, "integer_pruning": self.integer_pruning > 0,
            "variance_threshold": self.uses_svd, "correction_rank": self.correction_rank > 0,
            "a budget": self.has_budget,
        }  # fmt: skip
        for what in (name for name, given in clash.items() if given):
            raise ValueError(f"coding_loss with {what}: it chooses scaling and pruning of whole matrices by itself; "
                             "leave one out (variance_threshold 1 for no SVD)")  # fmt: skip
        if not self.entropy_coding:
            raise ValueError("coding_loss without entropy_coding: zeros save no bytes before coding; switch it on")

    @property
    def uses_svd(self) -> bool:
        """Whether any matrix may become a factor pair."""
        return self.variance_threshold < 1.0

    @property
    def uses_pruning(self) -> bool:
        """Whether activations have to be measured and neurons removed."""
        return self.max_prune_ratio > 0.0

    @property
    def has_budget(self) -> bool:
        """Whether the allocator decides."""
        return self.budget is not None or self.ratio is not None or self.target_perplexity is not None

    @property
    def uses_all_moments(self) -> bool:
        """Whether the inputs of every matrix have to be measured."""
        return (
            self.has_budget or (self.svd_metric == "whitened" and self.uses_svd) or self.feedback
            or self.correction_rank > 0 or self.scaling_alpha > 0 or self.integer_pruning > 0 or self.coding_loss > 0
        )  # fmt: skip

    @property
    def uses_moments(self) -> bool:
        """Whether matrices are stored by their inputs: all of them, or down_proj to make up for dropped neurons."""
        return self.uses_all_moments or (self.uses_pruning and self.compensation != "none")

    @property
    def uses_text(self) -> bool:
        """Whether the calibration text is read."""
        return self.uses_pruning or self.uses_moments

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
        for option in ("compensation", "prune_score"):
            pruned = name == "budget" or float(values.get("max_prune_ratio", 1.0)) > 0.0
            if overrides.get(option, "none") != "none" and not pruned:
                raise OptionError(f"{option} {overrides[option]} without pruning; set max_prune_ratio")
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
        "prune_score": "up",
        "compensation": "none",
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
    "int4": {"variance_threshold": 1.0, "max_prune_ratio": 0.0, "bits": 4, "feedback": True},
    "budget": {
        "variance_threshold": 1.0,
        "max_prune_ratio": 0.0,
        "svd_metric": "whitened",
        "feedback": True,
    },
}
