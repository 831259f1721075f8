"""Peak memory of a compression, told before it from shapes alone.

Not a measurement (`memory`): the sizes of the tensors that are alive together, in the stage that needs most.
Interpreter, libraries and tokenizer are there before it, and the caller knows what they take. Where a GPU compresses,
nearly all of this lies there.
"""

from __future__ import annotations

from dataclasses import dataclass

from spq.architecture import ModelSpec
from spq.config import SPQConfig
from spq.decoder import ALL_INPUTS, INPUTS, MICRO_BATCH_TOKENS, InputName
from spq.layout import num_parameters
from spq.prune import kept_width
from spq.quantize import CHUNK_ELEMENTS
from spq.recover import PIECE_TOKENS
from spq.scoring import BATCH_TOKENS as MODEL_TOKENS
from spq.scoring import SLICE_BYTES
from spq.sensitivity import BATCH_TOKENS, PROBE_TOKENS

FLOAT, WIDE = 4, 8  # bytes of float32 and float64
MODEL_CLASSES = 60 << 20  # of transformers, once imported; measured on x86-64, transformers 5.23
USUAL_CUT = 0.3  # of the neurons, by a budget: what it will be is not known before


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes by stage, on top of what the process has. `windows`: (count, length) of the calibration text, if used."""

    spec: ModelSpec
    options: SPQConfig
    windows: tuple[int, int] | None
    itemsize: int  # bytes of a stored element of the source

    def nbytes(self) -> int:
        """Of the stage that needs most."""
        held = MODEL_CLASSES + self._kept() if self.options.has_budget else 0
        return max(self.table(), self.deciding(), held + self.writing(), self.training())

    def table(self) -> int:
        """The embedding rounded: its integers, and a piece of it in float32, twice."""
        size = self.spec.vocab_size * self.spec.hidden_size
        return size * (1 if self.options.quantize_embedding else self.itemsize) + 2 * FLOAT * min(size, CHUNK_ELEMENTS)

    def deciding(self) -> int:
        """SVD and activations of a layer, or the survey, the sensitivities and the check of a budget."""
        options = self.options
        if options.has_budget:
            survey = self._states() + self._layer() + self._moments(ALL_INPUTS)
            return max(survey + max(self._running(ALL_INPUTS), self._surveying()), self._probing(), self._verifying())
        if not options.uses_svd and not options.uses_pruning:
            return 0
        need = self._layer() + (self._attention() if options.uses_svd else 0)
        if self.windows is None:
            return need + self._spectrum()
        measured: tuple[InputName, ...] = ("down",) if options.uses_pruning and options.prune_score == "energy" else ()
        activations = self._moments(measured) + self._running(measured)
        whitened = 0
        if options.uses_svd and options.svd_metric == "whitened":
            names: tuple[InputName, ...] = ("attention", "o")
            whitened = self._moments(names) + max(self._states() + self._running(names), self._spectrum())
        return need + self._states() + max(activations, whitened, self._spectrum() if options.uses_svd else 0)

    def writing(self) -> int:
        """A layer rounded, and run as it was and as it is stored."""
        options = self.options
        if not options.uses_moments or self.windows is None:
            return self._layer() + self._rounding()
        names = ALL_INPUTS if options.uses_all_moments else ("down",)
        before = self._states() + self._running(names)  # states are copied for it
        after = self._layer() + max(self._rounding(), self._refitting(), self._running(()))
        return self._layer() + self._states() + self._moments(names) + max(before, after)

    def training(self) -> int:
        """The model in float32 with its activations, twice the layers' (theirs and their gradients')."""
        if not self.options.recover_steps:
            return 0
        spec = self.spec
        per_token = spec.num_layers * (8 * spec.hidden_size + 6 * spec.intermediate_size) + 4 * spec.vocab_size
        return FLOAT * num_parameters(spec) + FLOAT * PIECE_TOKENS * per_token

    def _states(self) -> int:
        count, length = self.windows or (0, 0)
        return FLOAT * count * length * self.spec.hidden_size

    def _layer(self) -> int:
        return FLOAT * sum(rows * columns for rows, columns in self.spec.linear_shapes().values())

    def _attention(self) -> int:
        shapes = self.spec.linear_shapes()
        return FLOAT * sum(rows * columns for path, (rows, columns) in shapes.items() if "self_attn" in path)

    def _moments(self, names: tuple[InputName, ...]) -> int:
        return sum(WIDE * self._inputs(name) ** 2 for name in names)

    def _inputs(self, name: InputName) -> int:
        return self.spec.linear_shapes()[INPUTS[name]][1]

    def _running(self, names: tuple[InputName, ...]) -> int:
        """B tokens through a layer: residual, norm and three of the MLP's width; or rows taken into a moment, whose
        product is there in float32 and, to be added, in float64."""
        count, length = self.windows or (0, 0)
        tokens = min(count, max(1, MICRO_BATCH_TOKENS // max(1, length))) * length
        spec = self.spec
        through = FLOAT * tokens * (2 * spec.hidden_size + 3 * spec.intermediate_size)
        taken = [FLOAT * tokens * (spec.hidden_size + 2 * n) + (FLOAT + WIDE) * n * n for n in map(self._inputs, names)]
        return max([through, *taken])

    def _largest(self) -> tuple[int, int]:
        """(out, in) of the largest matrix of a layer."""
        return max(self.spec.linear_shapes().values(), key=lambda shape: shape[0] * shape[1])

    def _spectrum(self) -> int:
        """Of the largest attention matrix, in float64: it, its product, the Gram matrix, its vectors and their work."""
        shapes = [shape for path, shape in self.spec.linear_shapes().items() if "self_attn" in path]
        return max(WIDE * (2 * rows * columns + 5 * min(rows, columns) ** 2) for rows, columns in shapes)

    def _rounding(self) -> int:
        """The largest matrix to integers: a scaled copy; with feedback three float64 matrices of its inputs on the way
        to the root, or six copies of the weights."""
        rows, columns = self._largest()
        size = rows * columns
        if not self.options.feedback:
            return 2 * FLOAT * min(size, CHUNK_ELEMENTS) + size
        n = max(self._inputs(name) for name in ALL_INPUTS)
        return max(3 * WIDE * n * n + FLOAT * size, 6 * FLOAT * size)

    def _refitting(self) -> int:
        """down_proj without its dropped neurons: damped moments, their kept part and its root, and the matrix twice."""
        options, spec = self.options, self.spec
        if options.compensation != "refit" or not (options.uses_pruning or options.has_budget):
            return 0
        width = spec.intermediate_size
        ratio = USUAL_CUT if options.has_budget else options.max_prune_ratio
        kept = kept_width(width, ratio, options.width_multiple)
        return WIDE * (width * width + 2 * kept * kept + spec.hidden_size * (width + 2 * kept))

    def _surveying(self) -> int:
        """The largest matrix rounded, its spectrum, or the neurons' errors by a root in falling order."""
        rows, columns = self._largest()
        width = self.spec.intermediate_size
        spectrum = WIDE * (2 * rows * columns + 5 * min(rows, columns) ** 2 + columns * columns)
        neurons = WIDE * (3 * width * width + 2 * self.spec.hidden_size * width)
        return max(self._rounding(), spectrum, neurons)

    def _probing(self) -> int:
        """The model in float32, states before each layer, log probabilities, and the embedding with noise."""
        spec = self.spec
        tokens = max(PROBE_TOKENS, (self.windows or (0, 0))[1])
        table = spec.vocab_size * spec.hidden_size
        kept = FLOAT * tokens * ((spec.num_layers + 2) * spec.hidden_size + spec.vocab_size)
        noise = FLOAT * max(3 * table, 5 * BATCH_TOKENS * spec.vocab_size)
        return FLOAT * num_parameters(spec) + kept + noise

    def _verifying(self) -> int:
        """The model in float32 on the spare windows, with a batch on its way, and slices of logits of two models with
        their logarithms."""
        spec = self.spec
        count, length = self.windows or (0, 0)
        through = FLOAT * min(count * length, MODEL_TOKENS) * (4 * spec.hidden_size + 3 * spec.intermediate_size)
        return MODEL_CLASSES + FLOAT * num_parameters(spec) + self._kept() + max(through, 6 * SLICE_BYTES)

    def _kept(self) -> int:
        """What the original says on the spare windows: hidden states and its head."""
        count, length = self.windows or (0, 0)
        return FLOAT * (count * length + self.spec.vocab_size) * self.spec.hidden_size
