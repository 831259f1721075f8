"""Measuring one model after the other on the same texts: what `spq-eval` and a search do, without a command line.

A model is a folder, plain or packed, or the URL of a running server. The definitions are in `quality`, `footprint` and
`evaluate`; this only brings models, texts and protocol together into a `Row`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spq.architecture import ModelSpec
from spq.calibrate import tokenize
from spq.errors import CalibrationError, OptionError
from spq.evaluate import choose_window, cut_windows, perplexity_of
from spq.footprint import measure_footprint
from spq.manifest import REPORT_NAME
from spq.quality import Quality, compare, measure, predict
from spq.report import read_report
from spq.rows import Option, Row, TaskScore, TextScore, make_row
from spq.scoring import LocalModel
from spq.served import ServedModel
from spq.texts import EvaluationText

TaskRunner = Callable[[LocalModel | ServedModel], dict[str, TaskScore]]


@dataclass
class Judge:
    """The protocol: every model gets the same texts, cut the same way."""

    texts: Sequence[EvaluationText]
    device: torch.device
    dtype: torch.dtype
    reference: LocalModel | None = None  # the original, for agreement, KL and retention
    window: int | None = None  # default: the smallest context at hand, at most 2,048
    max_tokens: int | None = None
    bos: bool = False
    tasks: TaskRunner | None = None
    on_text: Callable[[str], None] = field(default=lambda name: None)  # hears what is measured next

    def folder(self, folder: Path, name: str | None = None, options: dict[str, Option] | None = None) -> Row:
        """A row of a model folder. Raises SpqError, also for a text that the model was trained on."""
        self._refuse_lessons(folder)
        footprint = measure_footprint(folder)
        same = self.reference is not None and self.reference.folder.resolve() == folder.resolve()
        model = self.reference if same and self.reference else LocalModel(folder, self.device, self.dtype)
        scores = {}
        for text in self.texts:
            self.on_text(text.name)
            windows = self._cut(tokenize(folder, text.text), model.spec.max_positions, model.spec)
            if self.reference is None:
                quality = measure(model, windows, bos=self.bos)
            else:
                quality = compare(model, self.reference, windows, bos=self.bos)
            scores[text.name] = TextScore.of(quality, text.sha256)
        return make_row(name or folder.name, footprint, scores, tasks=self._tasks(model), options=options)

    def _refuse_lessons(self, folder: Path) -> None:
        if not (folder / REPORT_NAME).is_file():
            return
        recovery = read_report(folder).recovery
        for text in self.texts:
            if recovery is not None and recovery.text_hash == text.sha256:
                raise OptionError(f"{folder}: was trained on {text.name} (recovery); evaluate it on another text")

    def server(self, model: ServedModel) -> Row:
        """A row of a running server; KL and bytes of files are not to be had from there. Raises SpqError."""
        scores = {}
        for text in self.texts:
            self.on_text(text.name)
            reference = self.reference
            ids = model.tokenize(text.text) if reference is None else tokenize(reference.folder, text.text)
            windows = self._cut(ids, model.context, None if reference is None else reference.spec)
            scores[text.name] = TextScore.of(self._served(model, windows), text.sha256)
        return make_row(model.url, None, scores, tasks=self._tasks(model), resident_bytes=model.resident_bytes)

    def _served(self, model: ServedModel, windows: Tensor) -> Quality:
        found = model.score(windows)
        perplexity = perplexity_of(found.nll, windows, self.bos)
        if self.reference is None:
            return Quality(perplexity)
        base_nll, best = predict(self.reference, windows)
        spelled = model.spelled(best.flatten().tolist())
        agreed = sum(
            spelled[token_id] == token
            for ids, tokens in zip(best.tolist(), found.best, strict=True)
            for token_id, token in zip(ids, tokens, strict=True)
        )
        return Quality(perplexity, perplexity_of(base_nll, windows, self.bos), agreed / perplexity.num_tokens)

    def _cut(self, ids: Tensor, context: int, spec: ModelSpec | None) -> Tensor:
        """The windows of a text. `spec` says which token BOS is."""
        if self.reference is not None:
            context = min(context, self.reference.spec.max_positions)
        bos_id = None
        if self.bos:
            if spec is None:
                raise OptionError("BOS by URL: a server does not say which token it is; give its model as reference")
            bos_id = spec.config.bos_token_id
            if not isinstance(bos_id, int):
                raise CalibrationError(f"config.json names no single bos_token_id ({bos_id!r}); evaluate without BOS")
        return cut_windows(ids, choose_window(self.window, context), bos_id=bos_id, max_tokens=self.max_tokens)

    def _tasks(self, model: LocalModel | ServedModel) -> dict[str, TaskScore]:
        if self.tasks is None:
            return {}
        self.on_text("tasks")
        return self.tasks(model)
