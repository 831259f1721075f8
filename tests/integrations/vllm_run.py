"""Run by the Python that has vLLM: `vllm_run.py JOBS RESULTS`, both JSON files. One model after the other, one process.

A job is a folder, prompts as token ids, how many tokens, and options of vLLM's LLM. A result has the tokens, or the
error in one line, and what the model holds: bytes of vLLM's parameters, of our products, and their dtypes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8} | job["options"]
    model = LLM(model=job["folder"], skip_tokenizer_init=True, **options)
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    answers = model.generate(prompts, params, use_tqdm=False)
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    return {"tokens": tokens} | (held(model) if options.get("tensor_parallel_size", 1) == 1 else {})


def held(model: Any) -> dict[str, Any]:
    def weigh(module: Any) -> tuple[int, int]:
        products = {
            part.spq_product.name: part.spq_product.nbytes for part in module.modules() if hasattr(part, "spq_product")
        }
        return sum(parameter.nbytes for parameter in module.parameters()), sum(products.values())

    parameters, products = model.apply_model(weigh)[0]
    return {"parameter_bytes": parameters, "product_bytes": products}


def main(jobs: Path, results: Path) -> None:
    done = []
    for job in json.loads(jobs.read_text("utf-8")):
        try:
            done.append(run(job))
        except Exception as error:  # refusals are what some jobs are for
            done.append({"error": f"{type(error).__name__}: {error}"})
        gc.collect()
    results.write_text(json.dumps(done), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
