"""What the operator may choose, checked. `server.cli` fills it from arguments and SPQ_* variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FilePath, model_validator

GIB = 1024**3


class ServerConfig(BaseModel):
    """All options of the server. Bytes are bytes, `_s` are seconds; None means: decide from the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # model
    model: str  # packed folder, Hugging Face folder, or hub id
    revision: str | None = None
    served_model_names: tuple[str, ...] = ()  # empty: the folder's name
    preset: Literal["default", "paper", "int8", "int4", "none"] = "default"  # where the model is not packed
    weight_budget: int | None = Field(None, gt=0)  # bytes of the packed model, by the allocator
    calibration: str | None = None  # text file; None = the bundled sample
    cache_dir: Path = Path("~/.cache/spq-serve")
    chat_template: Path | None = None
    tool_format: Literal["auto", "json", "hermes", "llama3", "mistral", "mistral11", "pythonic"] = "auto"
    max_model_len: int | None = Field(None, ge=2)  # tokens; None = the model's, or what fits

    # device and memory
    device: Literal["auto", "cuda", "cpu"] = "auto"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    backend: Literal["auto", "reference", "cpu", "native", "triton"] = "auto"
    kv_dtype: Literal["auto", "int8", "float32", "float16", "bfloat16"] = "auto"
    memory_budget: int | None = Field(None, gt=0)  # bytes on the device, whole process
    kv_memory: int | None = Field(None, gt=0)  # bytes, overrides what the budget would leave
    resident: Literal["decoded", "coded"] = "decoded"  # how integers of layers are kept
    resident_tolerance: float = Field(0.1, ge=0.0, le=1.0)  # share of tokens/s that coded layers may cost
    int8_prefill: bool = False
    cuda_graphs: bool = True
    threads: int | None = Field(None, ge=1)  # CPU threads for tensor work

    # scheduling
    max_num_seqs: int = Field(64, ge=1)  # sequences running at once
    max_batch_tokens: int = Field(512, ge=16)  # tokens per step: the length of a prefill chunk
    block_size: int = Field(16, ge=1)  # tokens per KV page
    prefix_caching: bool = True
    admission_reserve: float = Field(0.3, ge=0.0, le=1.0)  # share of the not yet generated tokens kept free
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    speculative_ngram: int = Field(0, ge=0, le=32)  # tokens guessed ahead at most; 0 = off
    max_queue: int = Field(256, ge=0)  # sequences waiting; more are refused with 503

    # HTTP
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: tuple[str, ...] = ()  # KEY or NAME=KEY
    api_key_file: FilePath | None = None  # TOML, see docs/security.md
    admin_key: str | None = Field(None, min_length=1)  # of /admin; None: there is no way in
    requests_per_minute: int | None = Field(None, gt=0)  # of each key, where the file says no other
    tokens_per_minute: int | None = Field(None, gt=0)
    cors_origins: tuple[str, ...] = ()  # of pages that may call; "*": any
    tls_cert: FilePath | None = None  # PEM, with the chain
    tls_key: FilePath | None = None
    sleep_idle_s: float | None = Field(None, gt=0)  # without requests, then the model is dropped until one comes
    request_timeout_s: float | None = Field(None, gt=0)
    client_timeout_s: float = Field(60.0, gt=0)  # for the next part of a request, or of an answer to be read
    drain_timeout_s: float = Field(30.0, ge=0)
    max_body_bytes: int = Field(8 * 1024 * 1024, ge=1024)
    max_sequences_per_request: int = Field(128, ge=1)  # n x prompts of one call
    response_store_bytes: int = Field(64 * 1024 * 1024, ge=0)  # of answers of /v1/responses; 0 = nothing is kept
    trust_request_chat_template: bool = False
    access_log: Literal["text", "json", "off"] = "text"
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://[^/\s]+(/\S*)?$")  # of an OpenTelemetry collector
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def max_sampled_rows(self) -> int:
        """Rows of logits that a step may need."""
        return max(self.max_num_seqs, 1 + self.speculative_ngram)

    @model_validator(mode="after")
    def _budget_has_room(self) -> Self:
        if self.max_batch_tokens <= self.max_num_seqs:
            raise ValueError(
                f"--max-batch-tokens {self.max_batch_tokens} must exceed --max-num-seqs {self.max_num_seqs}, or full "
                "batches would leave no room for prompts"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_compress(self) -> Self:
        if self.weight_budget is not None and "preset" in self.model_fields_set:
            raise ValueError(f"--weight-budget takes the place of --preset {self.preset}; leave one of them out")
        return self

    @model_validator(mode="after")
    def _tolerance_has_a_use(self) -> Self:
        if self.resident == "decoded" and "resident_tolerance" in self.model_fields_set:
            raise ValueError("--resident-tolerance is about --resident coded, which is not asked for; leave it out")
        return self

    @model_validator(mode="after")
    def _limits_have_keys(self) -> Self:
        limited = self.requests_per_minute is not None or self.tokens_per_minute is not None
        if limited and not self.api_keys and self.api_key_file is None:
            raise ValueError("limits per minute count by API key, and there is none; give --api-key or --api-key-file")
        return self

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key belong together; give both or none")
        return self
