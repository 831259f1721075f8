"""The entry point that vLLM calls in every process: it makes the quantization method `spq` known.

Not the method (`config`, `methods`). vLLM is imported inside the function, so that importing this module costs nothing.
"""

from __future__ import annotations


def register() -> None:
    """Register with vLLM; may be called more than once.

    Raises RuntimeError for a vLLM whose loader does not bring tensors to a layer's own `load_weights`.
    """
    import vllm
    from vllm.model_executor.layers.linear import QKVParallelLinear
    from vllm.model_executor.layers.quantization import register_quantization_config

    from spq_vllm.config import SpqQuantizationConfig

    if not hasattr(QKVParallelLinear, "load_weights"):
        raise RuntimeError(
            f"spq-serve-vllm: vLLM {vllm.__version__} loads weights in another way; this plugin was tested with 0.32.0"
        )
    register_quantization_config("spq")(SpqQuantizationConfig)
