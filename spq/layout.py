"""Which tensors a supported model consists of, with their shapes: the list every file is checked against.

Not the files themselves (`tensorfile`) and not the numbers of a family (`architecture`).
"""

from __future__ import annotations

from math import prod

from spq.architecture import ATTENTION, MLP, ModelSpec

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm.weight"


def linear_path(local: str) -> str:
    """Path of a matrix inside its decoder layer: q_proj -> self_attn.q_proj."""
    return f"{'self_attn' if local in ATTENTION else 'mlp'}.{local}"


def has_bias(spec: ModelSpec, local: str) -> bool:
    """Whether a matrix of a decoder layer (`q_proj`, ...) carries a bias in this family and configuration."""
    if spec.architecture == "MistralForCausalLM":
        return False
    if spec.architecture == "Qwen2ForCausalLM":
        return local in ("q_proj", "k_proj", "v_proj")
    if local in ATTENTION:
        return bool(getattr(spec.config, "attention_bias", False))
    return spec.architecture == "LlamaForCausalLM" and bool(getattr(spec.config, "mlp_bias", False))


def layer_linears(spec: ModelSpec, layer: int, width: int | None = None) -> dict[str, tuple[int, int]]:
    """Full module name -> (out, in) of the seven matrices of a layer; `width` replaces the unpruned MLP width."""
    shapes = {f"{spec.layer_prefix(layer)}.{path}": shape for path, shape in spec.linear_shapes().items()}
    if width is not None:
        mlp = f"{spec.layer_prefix(layer)}.mlp"
        hidden = spec.hidden_size
        shapes |= {f"{mlp}.gate_proj": (width, hidden), f"{mlp}.up_proj": (width, hidden)}
        shapes[f"{mlp}.down_proj"] = (hidden, width)
    return shapes


def layer_vectors(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Full tensor name -> shape of the norms of a layer."""
    prefix, hidden = spec.layer_prefix(layer), (spec.hidden_size,)
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": hidden,
        f"{prefix}.post_attention_layernorm.weight": hidden,
    }
    if spec.qk_norm:
        shapes |= {f"{prefix}.self_attn.{name}.weight": (spec.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def model_linears(spec: ModelSpec, widths: tuple[int, ...] | None = None) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every matrix: all layers, the embedding, and the head unless tied."""
    table = (spec.vocab_size, spec.hidden_size)
    shapes = {EMBEDDING: table}
    for layer in range(spec.num_layers):
        shapes |= layer_linears(spec, layer, None if widths is None else widths[layer])
    if not spec.tied:
        shapes[HEAD] = table
    return shapes


def model_vectors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of every norm."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(spec.num_layers):
        shapes |= layer_vectors(spec, layer)
    return shapes | {FINAL_NORM: (spec.hidden_size,)}


def module_has_bias(spec: ModelSpec, module: str) -> bool:
    """`has_bias` by full module name; the embedding and the head have none."""
    local = module.rpartition(".")[2]
    return local in ATTENTION + MLP and has_bias(spec, local)


def num_parameters(spec: ModelSpec) -> int:
    """Elements of a plain checkpoint, a tied table once."""
    return sum(map(prod, expected_source(spec).values()))


def expected_source(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of everything a plain Hugging Face checkpoint of this model must hold."""
    shapes: dict[str, tuple[int, ...]] = dict(model_vectors(spec))
    for module, (rows, columns) in model_linears(spec).items():
        shapes[f"{module}.weight"] = (rows, columns)
        if module_has_bias(spec, module):
            shapes[f"{module}.bias"] = (rows,)
    return shapes
