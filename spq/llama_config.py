"""LLaMA's configuration without the import of transformers' own, which costs 151 MiB and 3 s.

Not another configuration: the fields and defaults are transformers' (a test compares them all), and what is done with
them (old and new spellings of rotary scaling, checks) is its base class's. transformers 5.23 declares `LlamaConfig` in
a module that imports, for a check of one field that only training reads, the activations, attention kernels and with
them torch's compiler and Triton. Its other families' configurations import nothing of that and are used as they are.

Annotations are evaluated here, unlike elsewhere: `strict` checks values against them.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig


@strict
class LlamaConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its __init_subclass__ has no types
    """See transformers' class of this name, by which its AutoTokenizer recognises it. Raises what that one raises."""

    model_type = "llama"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: int | float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """What is not given follows from what is."""
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    def validate_architecture(self) -> None:
        """Called by `strict`."""
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"The hidden size ({self.hidden_size}) is not a multiple of the number of attention "
                f"heads ({self.num_attention_heads})."
            )
