"""TruthfulQA (multiple choice) and GSM8K through lm-evaluation-harness, from local files, in process or by URL.

Prompts, scoring and answer extraction are those of the pinned `lm-eval` (the extra `eval`); only its data sets, which
it would download, are replaced. Both ways get the same tokens: the same BOS, the same cut of too long prompts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from spq.calibrate import read_text
from spq.errors import CalibrationError, OptionError
from spq.rows import TaskScore
from spq.scoring import LocalModel
from spq.served import ServedModel

NEEDS = ("lm_eval", "accelerate", "peft", "aiohttp", "tenacity")  # accelerate and peft: in process; the others: by URL
GSM8K_SHOTS = 5
METRICS = {  # ours -> the harness's task and metric
    "truthfulqa_mc1": ("truthfulqa_mc1", "acc,none"),
    "truthfulqa_mc2": ("truthfulqa_mc2", "acc,none"),
    "gsm8k": ("gsm8k", "exact_match,strict-match"),
    "gsm8k_flexible": ("gsm8k", "exact_match,flexible-extract"),
}
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tasks:
    """Which tasks to run, by their local files; call it with a model."""

    truthfulqa: Path | None = None  # mc_task.json of the TruthfulQA release
    gsm8k: Path | None = None  # test.jsonl of GSM8K
    gsm8k_shots: Path | None = None  # train.jsonl: five worked examples before each question; None: no examples
    limit: int | None = None  # questions per task
    tokenizer: Path | None = None  # folder; needed for a server

    def check(self) -> None:
        """Raise OptionError where lm-eval is missing, CalibrationError where a file is not what it should be."""
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        if missing:
            raise OptionError(
                f"TruthfulQA and GSM8K need lm-evaluation-harness (missing: {', '.join(missing)}); install the extra "
                "eval: pip install 'spq-serve[eval]', or pip install -r requirements-eval.txt in a clone"
            )
        if self.truthfulqa is not None:
            read_truthfulqa(self.truthfulqa)
        for path in (self.gsm8k, self.gsm8k_shots):
            if path is not None:
                read_gsm8k(path)

    def __call__(self, model: LocalModel | ServedModel) -> dict[str, TaskScore]:
        """Scores by name. Raises as `check`, and OptionError for a server without a tokenizer."""
        self.check()
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        with _quiet():
            found = simple_evaluate(
                _harness_model(model, self.tokenizer),
                tasks=self._build(),
                task_manager=TaskManager(include_defaults=False),  # reading its 14,000 task files takes minutes
                limit=self.limit,
                log_samples=False,
                random_seed=0,
            )
        scores = {}
        for name, (task, metric) in METRICS.items():
            if task not in found["results"]:
                continue
            result, stderr = found["results"][task], found["results"][task][metric.replace(",", "_stderr,")]
            scores[name] = TaskScore(
                value=result[metric],
                stderr=stderr if isinstance(stderr, float) else None,
                num_questions=found["n-samples"][task]["effective"],
                num_shots=found["n-shot"][task],
            )
        return scores

    def _build(self) -> list[Any]:
        """The harness's own tasks with our data in place of theirs."""
        built = []
        if self.truthfulqa is not None:
            splits = {"validation": read_truthfulqa(self.truthfulqa)}
            built += [_task("truthfulqa", name, splits) for name in ("truthfulqa_mc1", "truthfulqa_mc2")]
        if self.gsm8k is not None:
            splits = {"test": read_gsm8k(self.gsm8k)}
            more: dict[str, Any] = {"num_fewshot": 0, "training_split": None, "fewshot_split": None}
            if self.gsm8k_shots is not None:
                splits["train"] = read_gsm8k(self.gsm8k_shots)
                more = {"num_fewshot": GSM8K_SHOTS}
            built.append(_task("gsm8k", "gsm8k", splits, **more))
        return built


def read_truthfulqa(path: Path) -> list[Document]:
    """The questions of mc_task.json in the form the harness expects, the right answer of mc1 first.

    Raises CalibrationError naming the file.
    """
    try:
        documents = []
        for entry in json.loads(read_text(path)):
            document: Document = {"question": entry["question"]}
            for name in ("mc1_targets", "mc2_targets"):
                ordered = sorted(entry[name].items(), key=lambda choice: -int(choice[1]))
                if not ordered or int(ordered[0][1]) != 1:
                    raise ValueError(f"{entry['question']!r} has no right answer in {name}")
                document[name] = {"choices": [c for c, _ in ordered], "labels": [int(label) for _, label in ordered]}
            documents.append(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path}: not TruthfulQA's mc_task.json ({error})") from error
    return _filled(documents, path)


def read_gsm8k(path: Path) -> list[Document]:
    """The problems of a GSM8K file. Raises CalibrationError naming the file."""
    try:
        lines = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
        documents = [{"question": str(line["question"]), "answer": str(line["answer"])} for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: not JSON lines of GSM8K with question and answer ({error})") from error
    return _filled(documents, path)


def _filled(documents: list[Document], path: Path) -> list[Document]:
    if not documents:
        raise CalibrationError(f"{path}: no questions in it")
    return documents


def _task(folder: str, name: str, splits: dict[str, list[Document]], **changes: Any) -> Any:
    """A task of the harness by its own file, on `splits` in place of a download."""
    import lm_eval.tasks
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    def data_set(**_: Any) -> Any:
        return DatasetDict({split: Dataset.from_list(documents) for split, documents in splits.items()})

    path = Path(lm_eval.tasks.__file__).parent / folder / f"{name}.yaml"
    config = {key: value for key, value in load_yaml(path, resolve_func=True).items() if key != "tag"}
    return ConfigurableTask(config=config | {"custom_dataset": data_set} | changes)


def _harness_model(model: LocalModel | ServedModel, tokenizer: Path | None) -> Any:
    """The harness's wrapper of a model in memory or behind a URL.

    A request by URL generates one token more than it scores, which the harness then drops: texts are cut to one token
    less than the context both ways.
    """
    if isinstance(model, LocalModel):
        from lm_eval.models.huggingface import HFLM

        own = AutoTokenizer.from_pretrained(model.folder, local_files_only=True)
        return HFLM(
            pretrained=model.module,
            tokenizer=own,
            backend="causal",
            max_length=model.spec.max_positions - 2,  # HFLM keeps one more, which it does not feed
            batch_size=1,
            add_bos_token=_adds_bos(own),
        )
    if tokenizer is None:
        raise OptionError(f"{model.url}: tasks by URL need the model's tokenizer; give its folder")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{model.url}/v1/completions",
        model=model.name,
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        max_length=model.context,  # the harness takes one off
        num_concurrent=model.concurrency,
        add_bos_token=_adds_bos(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)),
        header={} if model.api_key is None else {"Authorization": f"Bearer {model.api_key}"},
    )


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer begins a text with its BOS by itself."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness explains itself at length; only its errors are for our users."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
