"""One compression into one folder: decide, write, and where the allocator decided, measure what it predicted.

Not the checks before and the move into place after (`compress`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spq.allocator import mapped_blocks
from spq.apply import Applier
from spq.budget import ASSORTMENTS, Market, MarketCache, open_markets
from spq.cache import source_hash
from spq.checkpoint import open_model, read_config
from spq.config import SPQConfig
from spq.errors import OptionError
from spq.layout import layer_linears, num_parameters
from spq.manifest import Manifest
from spq.pipeline import WRITE_WEIGHT, FactorsOf, Pipeline
from spq.progress import StageClock
from spq.quantize import GranularityRule
from spq.recipe import Decision, Storage, same
from spq.recover import STEP_WEIGHT, Lesson, train
from spq.recovered import Recovered
from spq.report import MatrixReport, PredictionReport, RecoveryReport
from spq.rules import Rules
from spq.source import Source
from spq.tensorfile import DTYPES
from spq.verify import Verifier
from spq.writer import TensorWriter, copy_companions

ATTEMPTS = 4  # to reach a perplexity; each but the last corrects the prediction by what was measured
EVERYTHING = next(iter(ASSORTMENTS))


@dataclass(slots=True)
class Written:
    """What is in the folder."""

    manifest: Manifest
    matrices: dict[str, MatrixReport]
    bytes_packed: int
    bytes_files: int
    prediction: PredictionReport | None
    recovery: RecoveryReport | None = None


@dataclass(slots=True)
class Run:
    """`windows` int64 [count, len] are to calibrate on, `spare` [count, len] to check a prediction on."""

    source: Source
    options: SPQConfig
    windows: Tensor | None
    spare: Tensor | None
    clock: StageClock
    max_shard_bytes: int
    lesson: Lesson | None = None  # what to train on, where recovery is asked for
    cache: MarketCache = field(default_factory=MarketCache)

    @staticmethod
    def weight(options: SPQConfig, num_layers: int) -> float:
        """Share of the time that writing and training take, for `StageClock`."""
        written = num_layers * WRITE_WEIGHT + WRITE_WEIGHT
        if options.recover_steps:
            return 2 * written + options.recover_steps * STEP_WEIGHT
        return written * (len(ASSORTMENTS) if options.has_budget else 1)

    def make(self, folder: Path) -> Written:
        """Fill the empty `folder` with a packed model. Raises SpqError."""
        copy_companions(self.source.folder, folder)
        if not self.options.has_budget:
            return self._by_rules(folder)
        markets = self.cache.get(self._market_key(), self._open_markets)
        if self.options.target_perplexity is not None:
            return self._to_perplexity(folder, markets[EVERYTHING], self.options.target_perplexity)
        return self._best(folder, markets, self._budget())

    def _open_markets(self) -> dict[str, Market]:
        assert self.windows is not None
        applier, storage = self._applier(), self._storage()
        return open_markets(self.source, self.options, applier, storage, self.windows, self.clock)

    def _market_key(self) -> str:
        """What a market follows from: the model, the windows, and all options but how much may be spent or trained."""
        assert self.windows is not None
        later = {"budget", "ratio", "target_perplexity", "entropy_coding"}
        later |= {name for name in type(self.options).model_fields if name.startswith("recover_")}
        digest = hashlib.sha256(self.windows.numpy().tobytes())
        digest.update(self.options.model_dump_json(exclude=later).encode())
        return f"{source_hash(self.source.folder)} {digest.hexdigest()} {self.source.device}"

    def _by_rules(self, folder: Path) -> Written:
        spool = folder / "spool"
        spool.mkdir()
        rules = Rules(self.source, self.options, self.windows, spool, self.clock)
        with mapped_blocks():
            decision = rules.decide()
        written = self._write(folder, decision, rules.factors)
        shutil.rmtree(spool)
        return written

    def _best(self, folder: Path, markets: dict[str, Market], budget: int) -> Written:
        """The choices within `budget` bytes, each written and measured on the spare windows; the nearest stays.

        With training, or nothing to measure on, it is the choice from everything.
        """
        first = markets[EVERYTHING].decide(budget)
        if self.spare is None:
            return self._write(folder, first)
        if self.lesson is not None:
            return self._checked(folder, first, self._verifier())
        choices = {EVERYTHING: first}
        for name, market in markets.items():
            if name == EVERYTHING or not market.fits(budget):
                continue
            choice = market.decide(budget)
            if not any(same(choice, other) for other in choices.values()):
                choices[name] = choice
        verifier = self._verifier()
        tried: dict[str, float] = {}
        for name, choice in choices.items():
            written = self._checked(folder, choice, verifier)
            assert written.prediction is not None and written.prediction.kl is not None
            tried[name] = written.prediction.kl
        best = min(tried, key=lambda name: tried[name])
        if best != name:
            written = self._checked(folder, choices[best], verifier)
        assert written.prediction is not None
        written.prediction = written.prediction.model_copy(update={"tried": tried})
        return written

    def _to_perplexity(self, folder: Path, market: Market, target: float) -> Written:
        """The smallest model that keeps to the target on the spare windows, by prediction and correction."""
        if self.spare is None:
            raise OptionError("target_perplexity needs text to measure it on, but no windows of the calibration text "
                              "are left; give a longer text or fewer calibration_windows")  # fmt: skip
        verifier = self._verifier()
        allowed = wanted = math.log(target / verifier.base)
        if wanted <= 0:
            raise OptionError(
                f"target_perplexity {target} is not above that of the original, {verifier.base:.4f}; raise it"
            )
        for _ in range(ATTEMPTS):
            written = self._checked(folder, market.decide_for_loss(allowed), verifier)
            assert written.prediction is not None and written.prediction.measured is not None
            risen = math.log(written.prediction.measured / verifier.base)
            if risen <= wanted:
                return written
            allowed *= 0.98 * wanted / risen
        raise OptionError(
            f"target_perplexity {target} was not reached in {ATTEMPTS} attempts: {verifier.base * math.exp(risen):.4f} "
            f"at {written.bytes_packed} bytes; raise it"
        )

    def _verifier(self) -> Verifier:
        assert self.spare is not None
        source = self.source
        return Verifier.of(source.folder, self.spare, source.device, DTYPES[source.checkpoint.dtype])

    def _checked(self, folder: Path, decision: Decision, verifier: Verifier) -> Written:
        """Written, and measured."""
        written = self._write(folder, decision)
        assert decision.predicted_nll is not None
        written.prediction = verifier.check(folder, decision.predicted_nll, trained=self.lesson is not None)
        return written

    def _write(self, folder: Path, decision: Decision, factors: FactorsOf | None = None) -> Written:
        """Write what was decided; with recovery once in float, to be trained, and then what training made of it."""
        if self.lesson is None:
            return self._pass(folder, self.options, self.source, decision, factors)
        stage = folder / "float"
        stage.mkdir()
        later = {
            "scaling_alpha": 0.0,
            "feedback": False,
            "correction_rank": 0,
            "integer_pruning": 0.0,
            "coding_loss": 0.0,
        }
        self._pass(stage, self.options.model_copy(update=later), self.source, decision.in_float(), factors)
        updates, report = train(stage, self.lesson, self.options, self.source.device, self.clock)
        made = self.source
        source = Recovered(made.folder, made.checkpoint, made.device, open_model(stage), updates, decision)
        written = self._pass(folder, self.options, source, decision, source.factors)
        written.recovery = report
        shutil.rmtree(stage)
        return written

    def _pass(
        self, folder: Path, options: SPQConfig, source: Source, decision: Decision, factors: FactorsOf | None
    ) -> Written:
        for old in folder.glob("*.safetensors*"):
            old.unlink()
        writer = TensorWriter(folder, self.max_shard_bytes)
        pipeline = Pipeline(
            source=source,
            options=options,
            decision=decision,
            windows=self.windows if options.uses_moments else None,
            applier=self._applier(decision),
            storage=self._storage(),
            writer=writer,
            clock=self.clock,
            factors=factors,
        )
        with mapped_blocks():
            pipeline.run()
        bytes_files = writer.finish()
        manifest = Manifest(options=self.options, modules=pipeline.plans, mlp_widths=tuple(decision.widths))
        config = read_config(self.source.folder) | {"quantization_config": manifest.dump()}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        written = Written(manifest, pipeline.matrices, writer.tensor_bytes, bytes_files, None)
        if decision.predicted_nll is not None:
            written.prediction = PredictionReport(rise=decision.predicted_nll)
        return written

    def _budget(self) -> int:
        if self.options.budget is not None:
            return self.options.budget
        assert self.options.ratio is not None
        return int(self.options.ratio * 2 * num_parameters(self.source.spec))

    def _applier(self, decision: Decision | None = None) -> Applier:
        """With the scale rule over the output sizes of every linear layer as it will be stored; a tied head counts."""
        spec = self.source.spec
        sizes = [spec.vocab_size]
        if decision is not None:
            for layer, width in enumerate(decision.widths):
                for module, (rows, _) in layer_linears(spec, layer, width).items():
                    rank = decision.recipes[module].rank
                    sizes += [rows] if rank is None else [rank, rows]
        dtype = DTYPES[self.source.checkpoint.dtype]
        return Applier(self.options, GranularityRule.over(self.options.granularity, sizes), dtype)

    def _storage(self) -> Storage:
        options = self.options
        itemsize = DTYPES[self.source.checkpoint.dtype].itemsize
        return Storage(options.group, options.symmetric, itemsize, "int8" if options.quantize else "dense")
