"""The rows of one model: every variant compressed, judged against the float16 original, and forgotten.

Not the list of variants (`variants`) and not what follows from the rows (`results_page`). A row's `options` hold what
only a page wants to know: its group, what the allocator predicted, why there is no figure.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from spq.budget import MarketCache
from spq.checkpoint import open_model, read_config
from spq.compress import compress
from spq.config import SPQConfig
from spq.errors import OptionError, OutputError
from spq.gptq import GptqFolder, open_gptq, write_plain
from spq.judge import Judge
from spq.report import Report
from spq.rows import Option, Row, read_rows
from spq.scoring import LocalModel
from spq.tensorfile import locate_tensors, read_tensor
from spq.texts import EvaluationText
from spq.variants import DEFAULT, FLOAT16, RECOVER_STEPS, RECOVERED, Setting, parts, recovered, search, variants
from spq.writer import copy_companions

CPU = torch.device("cpu")
AT = " at the bytes of "
TRAINED = "-recovered"  # ends the name of a checkpoint whose model was trained first
FITS = 3  # tries at the size of the headers
SPEED_TOKENS = ("--prompt-tokens", "32", "--new-tokens", "40", "--rounds", "2", "--streams", "1")


@dataclass(slots=True)
class Trials:
    """One model. `run` appends rows to `rows_file`; names that are there already are not measured again."""

    source: Path
    texts: Sequence[EvaluationText]
    calibration: str
    setting: Setting
    scratch: Path
    rows_file: Path
    max_tokens: int | None
    threads: int
    speed: bool
    on_row: Callable[[str], object]
    rows: dict[str, Row] = field(default_factory=dict)
    markets: MarketCache = field(default_factory=MarketCache)

    def run(self, checkpoints: Sequence[Path]) -> None:
        """Everything. `checkpoints`: folders of GPTQ, passed over where they are not there. Raises SpqError."""
        if self.rows_file.exists():
            self.rows = {row.name: row for row in read_rows(self.rows_file)}
        original = self.scratch / "original"
        round_to_float16(self.source, original)
        self.source = original
        judge = Judge(
            self.texts, CPU, torch.float32, LocalModel(original, CPU, torch.float32), self.setting.window,
            self.max_tokens,
        )  # fmt: skip
        if FLOAT16 not in self.rows:
            self._keep(judge.folder(original, FLOAT16), original)
        made = variants(self.setting)
        if importlib.util.find_spec("peft") is not None:
            made |= recovered(self.setting)
        for name, options in made.items():
            self._variant(name, options, judge)
        for checkpoint in checkpoints:
            if (checkpoint / "config.json").is_file():
                self._gptq(open_gptq(checkpoint), judge, trained=checkpoint.name.endswith(TRAINED))
        self._equal_bytes(judge)

    def _variant(self, name: str, options: SPQConfig, judge: Judge, more: dict[str, Option] | None = None) -> None:
        if name in self.rows:
            return
        out = self.scratch / "packed"
        try:
            report = self._compress(options, out)
        except OptionError as error:  # a budget below what the model can be made
            self._add(Row(name=name, options={"why_not": str(error)}))
            return
        self._keep(judge.folder(out, name, _told(report) | (more or {})), out)

    def _gptq(self, found: GptqFolder, judge: Judge, trained: bool = False) -> None:
        """GPTQ as it is and with int8 rows of the embedding, and the budgeted model at the file bytes of each."""
        base = self.rows[FLOAT16]
        for int8_table in (False, True):
            name = f"GPTQ {found.bits} bits" + (", int8 embedding" if int8_table else "")
            name += RECOVERED if trained else ""
            if name not in self.rows:
                plain = self.scratch / "gptq"
                saved = write_plain(found, self.source, plain, int8_table=int8_table)
                row = judge.folder(plain, name, {"group": found.group})
                shutil.rmtree(plain)
                nbytes = found.file_bytes - saved
                per_weight = 16 * nbytes / (base.fp16_bytes or 1)
                self._add(row.model_copy(update={
                    "file_bytes": nbytes, "resident_bytes": found.tensor_bytes - saved, "bits_per_weight": per_weight,
                    "tcr": None, "mcr": 1 - nbytes / (base.fp16_bytes or 1), "composite": None,
                }))  # fmt: skip
            if not trained or (found.bits == 4 and int8_table):  # the harder rival; each is one more training
                self._budgeted(name, judge, {"recover_steps": RECOVER_STEPS} if trained else {})

    def _budgeted(self, rival: str, judge: Judge, how: dict[str, Any] | None = None) -> None:
        """The allocator at the file bytes of a row: what its tensors may take is less, by the headers of its files."""
        name, target = f"SPQ budgeted{AT}{rival}", self.rows[rival].file_bytes
        if name in self.rows or target is None:
            return
        seen = (row.file_bytes - int(row.options["tensor_bytes"] or 0) for row in self.rows.values()
                if row.file_bytes and "rise" in row.options)  # fmt: skip
        budget, out = target - max(seen, default=0), self.scratch / "packed"
        for _ in range(FITS):
            try:
                report = self._compress(self.setting.budget(max(1, budget), **(how or {})), out)
            except OptionError as error:
                self._add(Row(name=name, options={"why_not": str(error)}))
                return
            if report.bytes_files <= target:
                break
            budget -= report.bytes_files - target
        self._keep(judge.folder(out, name, _told(report)), out)

    def _equal_bytes(self, judge: Judge) -> None:
        """The parts of SPQ, each alone, at the file bytes of the ensemble (`default`)."""
        target = self.rows[DEFAULT].file_bytes
        assert target is not None
        for family in parts(self.setting):
            name = f"{family.name}{AT}{DEFAULT}"
            if name in self.rows:
                continue
            dial = search(lambda x, f=family: self._nbytes(f.options(x)), family, target)  # type: ignore[misc]
            self._variant(name, family.options(dial), judge, {"dial": dial})
        self._budgeted(DEFAULT, judge)

    def _nbytes(self, options: SPQConfig) -> int:
        return self._compress(options, self.scratch / "packed").bytes_files

    def _compress(self, options: SPQConfig, out: Path) -> Report:
        return compress(
            self.source,
            out,
            options,
            calibration_text=self.calibration,
            device=CPU,
            overwrite=True,
            markets=self.markets,
        )

    def _keep(self, row: Row, folder: Path) -> None:
        if self.speed:
            row = row.model_copy(update={"tokens_per_s": tokens_per_s(folder, self.threads)})
        self._add(row)

    def _add(self, row: Row) -> None:
        self.rows[row.name] = row
        with self.rows_file.open("a", encoding="utf-8") as file:
            file.write(row.model_dump_json() + "\n")
        self.on_row(row.name)


def round_to_float16(source: Path, out: Path) -> None:
    """A copy of a plain folder in float16, what everything is compared with. Raises SpqError."""
    open_model(source).close()
    out.mkdir()
    copy_companions(source, out)
    save_file(
        {name: read_tensor(info).half() for name, info in locate_tensors(source).items()}, out / "model.safetensors"
    )
    (out / "config.json").write_text(json.dumps(read_config(source) | {"dtype": "float16"}), "utf-8")


def tokens_per_s(folder: Path, threads: int) -> float:
    """Decode speed of our engine, one stream, by its fastest step. Raises OutputError outside a clone."""
    repo = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.step", str(folder.resolve()), *SPEED_TOKENS, "--threads", str(threads)]
    found = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise OutputError(f"benchmarks.step failed: {found.stderr.strip()[-300:]}; leave --speed out")
    step_ms: float = json.loads(found.stdout.strip().splitlines()[-1])["rows"]["1"]["step_ms_min"]
    return 1e3 / step_ms


def _told(report: Report) -> dict[str, Option]:
    """Bytes of the tensors; what the allocator expected, with its own check on spare calibration windows."""
    found = report.prediction
    told: dict[str, Option] = {"tensor_bytes": report.bytes_packed}
    if report.recovery is not None:
        told["recover_steps"] = report.recovery.steps
    if found is not None:
        told |= {
            "rise": found.rise,
            "predicted": found.predicted,
            "measured": found.measured,
            "weak": found.weak,
            "kept": min(found.tried, key=lambda name: found.tried[name], default=None),
        }
    return told
