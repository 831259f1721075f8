"""lm-evaluation-harness through /v1/completions: its numbers are those of its own in-process model on the same weights.

Every way to tokenize: by the folder's tokenizer (ids or texts in requests), or by the server (/tokenizer_info,
/tokenize, /detokenize), where the harness leaves BOS out. Requests as texts are only right for tokenizers without BOS:
the harness counts no token that a server puts in front. The tasks are local: endings of sentences, and continuations.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import Live, serve
from models import real_model

NEEDS = ("lm_eval", "accelerate", "aiohttp", "tenacity")
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDS), reason="lm-eval is missing: requirements-eval.txt"
)

DOCUMENTS = [
    {"query": "The old man sat down in his", "choices": [" chair", " the of"], "gold": 0},
    {"query": "They sailed away over the wide", "choices": [" sea", " spoke", " under the"], "gold": 0},
    {"query": "It was a dark and stormy", "choices": [" table", " night"], "gold": 1},
    {"query": "Once upon a", "choices": [" time there was a king", " said he, and went"], "gold": 0},
]
CHOICE = """
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GREEDY = """
task: continuations
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""
WAYS: dict[str, dict[str, Any]] = {
    "ids of the folder's tokenizer": {"tokenizer_backend": "huggingface", "add_bos_token": True},
    "ids of the server's tokenizer": {"tokenizer_backend": "remote"},
    "what it finds, four at once": {"tokenizer_backend": "auto", "num_concurrent": 4},
    "texts": {"tokenizer_backend": "huggingface", "tokenized_requests": False},
}
CASES = [("without BOS" if way == "texts" else "with BOS", way) for way in WAYS]


@pytest.fixture(scope="module")
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = real_model("demo")
    assert folder is not None
    if request.param == "without BOS":
        folder = Path(shutil.copytree(folder, tmp_path_factory.mktemp("model") / "demo"))
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}), "utf-8")
    with serve(folder, backend="reference", kv_dtype="float32") as running:
        yield running
        assert running.is_idle()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (folder / "endings.yaml").write_text(CHOICE.format(data=data))
    (folder / "continuations.yaml").write_text(GREEDY.format(data=data))
    return folder


def evaluate(model: Any, tasks: Path) -> dict[str, list[Any]]:
    """The harness's own answers by task: for each question its scores, or its text."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model,
        tasks=["endings", "continuations"],
        # without its own tasks: to look through their 14,000 files takes minutes
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["endings"]["sample_len"] == len(DOCUMENTS)
    answers = {name: [sample["filtered_resps"] for sample in found["samples"][name]] for name in found["samples"]}
    return answers | {"metrics": [found["results"]["endings"][f"{name},none"] for name in ("acc", "acc_norm")]}


@pytest.mark.parametrize(("live", "way"), CASES, indirect=["live"])
def test_scores_and_texts_are_those_of_the_model_in_process(live: Live, tasks: Path, way: str) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    folder = live.service.config.model
    bos = "add_bos_token" in WAYS[way]
    expected = evaluate(HFLM(pretrained=folder, dtype="float32", device="cpu", add_bos_token=bos), tasks)
    options = {"tokenizer": folder} if WAYS[way]["tokenizer_backend"] == "huggingface" else {}
    model = LocalCompletionsAPI(
        base_url=f"{live.url}/v1/completions", model="demo", max_length=1024, **options, **WAYS[way]
    )
    found = evaluate(model, tasks)
    assert found["metrics"] == expected["metrics"]
    assert found["continuations"] == expected["continuations"]
    for ours, theirs in zip(found["endings"], expected["endings"], strict=True):
        for (score, greedy), (their_score, their_greedy) in zip(ours, theirs, strict=True):
            assert score == pytest.approx(their_score, abs=2e-3) and greedy == their_greedy
