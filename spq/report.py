"""What one compression did and cost: `spq_report.json` of a packed folder.

Not the manifest, which a reader needs; this is for people and dashboards. Bytes count a tied table once, and are
compared with float16 and with float32.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from spq.config import SPQConfig
from spq.errors import PackedFormatError
from spq.manifest import REPORT_NAME, Kind


class MatrixReport(BaseModel):
    """One matrix before and after."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    shape_before: tuple[int, int]
    shape: tuple[int, int]
    rank: int | None
    energy_rank: int | None  # smallest rank over the variance threshold, where an SVD was made
    reason: str  # of the rank decision; empty where none was made
    per_channel: bool | None  # whether each row has a scale; None where it is not int8
    bytes_fp16: int
    bytes: int
    alpha: float | None = None  # of the scaling of its inputs, and
    zeroed: float | None = None  # share of its integers set to zero, where coding_loss chose them


class PerplexityReport(BaseModel):
    """Perplexity before and after, by one protocol."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: float
    after: float
    num_tokens: int
    protocol: str
    text_hash: str


class PredictionReport(BaseModel):
    """What the allocator expected and what came, on windows of the calibration text that nothing was fitted to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rise: float  # of the loss, nats per token, predicted
    base: float | None = None  # perplexity of the original; None where no windows were left to measure on
    predicted: float | None = None  # perplexity
    measured: float | None = None
    kl: float | None = None  # KL(original || compressed), nats per token, measured
    num_tokens: int = 0
    weak: bool = False  # predicted and measured differ by more than 5 %
    tried: dict[str, float] = {}  # measured KL by what could be bought; the lowest was kept


class RecoveryReport(BaseModel):
    """What LoRA training did to the float model, before anything was rounded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    tokens: int  # seen in training, repetitions counted
    parameters: int  # trained
    loss_before: float  # nats per token on windows of the same text that were not trained on
    loss_after: float
    held_out_tokens: int
    text_hash: str  # SHA-256 of the text


class Report(BaseModel):
    """One run of `compress`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    source_hash: str  # content of the source folder, see spq.cache
    calibration_hash: str  # SHA-256 of the text, empty where none was needed
    calibration_tokens: int
    options: SPQConfig
    matrices: dict[str, MatrixReport]
    mlp_widths: tuple[int, ...]
    num_low_rank: int
    num_pruned_neurons: int
    num_parameters: int  # of the source
    bytes_fp16: int
    bytes_fp32: int
    bytes_packed: int  # tensor bytes
    bytes_files: int  # shard files, headers included
    device: str
    rss_at_start_bytes: int
    peak_rss_bytes: int
    peak_gpu_bytes: int
    expected_bytes: int | None = None  # the peak as told before: resident on the CPU, else of the GPU
    seconds: dict[str, float]  # by stage
    perplexity: PerplexityReport | None = None
    prediction: PredictionReport | None = None  # where the allocator decided
    recovery: RecoveryReport | None = None  # where it was asked for

    @property
    def ratio(self) -> float:
        """Packed bytes per float16 byte."""
        return self.bytes_packed / self.bytes_fp16

    def save(self, folder: Path) -> None:
        """Write spq_report.json."""
        (folder / REPORT_NAME).write_text(self.model_dump_json(indent=1) + "\n", "utf-8")


def read_report(folder: Path) -> Report:
    """The report of a packed folder. Raises PackedFormatError where it is missing or of another version."""
    path = folder / REPORT_NAME
    try:
        return Report.model_validate_json(path.read_text("utf-8"))
    except (OSError, ValidationError) as error:
        raise PackedFormatError(f"{path}: not a readable report ({error}); compress again") from error
