"""POST /v1/embeddings: the model's last hidden states, after the last norm, averaged over all tokens of each text.

A model for text generation was not trained for this: texts of like words come out near each other, and that is all
that is promised. Nothing is generated; all tokens of a prompt are run, also those whose keys the cache has.
"""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.api.body import JSONRoute
from server.api.deps import (
    ERRORS,
    ServiceDep,
    check_model,
    check_num_sequences,
    encode,
    new_id,
    read_deadline,
    take_model,
)
from server.api.fields import PositiveTokenCount, Prompts
from server.api.plan import check_priority, truncate
from server.api.protocol import PromptOptions
from server.api.record import current_record
from server.api.responses import Answer
from server.api.sampling import check_prompt, first_given, resolve_max_tokens
from server.api.sse import until_disconnect
from server.core import SamplingParams
from server.engine.engine import Engine, Generation, GenerationRequest
from server.errors import BadRequest, EngineError

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter(route_class=JSONRoute)


class EmbeddingRequest(PromptOptions):
    """POST /v1/embeddings. `dimensions` may only be what the model has; `use_activation` false keeps the length."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveTokenCount | None = None
    user: str | None = None
    add_special_tokens: bool | None = None
    use_activation: bool | None = None


class Embedding(Answer):
    """One vector of the model's hidden size: numbers, or in base64 their bytes as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens that were run."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Answer):
    """Answer of /v1/embeddings, in the order of the input."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=ERRORS)
async def create_embeddings(body: EmbeddingRequest, request: Request, service: ServiceDep) -> Response:
    """One vector for each text: the mean of its tokens' last hidden states, of length 1."""
    check_model(service, body.model)
    deadline_s = read_deadline(request, service)
    check_num_sequences(service, n=1, num_prompts=len(body.input), param="input")
    check_priority(service, body)
    engine, tokenizer = await take_model(request, service, deadline_s)
    if body.dimensions not in (None, engine.info.hidden_size):
        raise BadRequest(
            f"this model's vectors have {engine.info.hidden_size} dimensions and cannot be shortened",
            param="dimensions",
            code="unsupported_value",
        )
    params = SamplingParams(max_tokens=0, pools=True)
    call_id = new_id("embd")
    requests = []
    for index, text in enumerate(body.input):
        if isinstance(text, str):
            special = first_given(body.add_special_tokens, default=True)
            ids = await encode(tokenizer, text, add_special_tokens=special)
        else:
            ids = text
        check_prompt(ids, engine.info, param="input")
        ids = truncate(ids, body, engine.info, max_tokens=0)
        resolve_max_tokens(0, default=0, num_prompt_tokens=len(ids), info=engine.info, param="input",
                           prompt_param="input")  # fmt: skip
        priority = first_given(body.priority, default=0)
        requests.append(GenerationRequest(f"{call_id}-{index}", ids, params, deadline_s, priority, body.cache_salt))
    generations = await until_disconnect(request.receive, _run(requests, engine, service))
    answer = await asyncio.to_thread(_answer, body, generations)
    return Response(answer, media_type="application/json")


async def _run(requests: Sequence[GenerationRequest], engine: Engine, service: Service) -> list[Generation]:
    """Submit, wait for all, count. Raises what `Engine.submit` and a generation raise; aborts what is left."""
    metrics = service.metrics
    generations = engine.submit(requests)
    ended = 0
    try:
        for generation in generations:
            async for _ in generation:
                continue
            ended += 1
            sequence = generation.sequence
            metrics.prompt(sequence.num_prompt_tokens, 0)
            current_record().add_prompt(sequence.num_prompt_tokens, 0)
            metrics.sequence_ended(sequence, num_tokens=0, reason="stop", last_token_s=None)
    finally:
        for generation in generations[ended:]:
            generation.abort()
            metrics.sequence_ended(generation.sequence, num_tokens=0, reason="abort", last_token_s=None)
    return generations


def _answer(body: EmbeddingRequest, generations: Sequence[Generation]) -> bytes:
    data = []
    for index, generation in enumerate(generations):
        states = generation.sequence.states
        vector = mean_vector(states.total, states.num_tokens, unit=body.use_activation is not False)
        shown = vector if body.encoding_format != "base64" else encode_base64(vector)
        data.append(Embedding(object="embedding", index=index, embedding=shown))
    num_tokens = sum(generation.sequence.num_prompt_tokens for generation in generations)
    usage = EmbeddingUsage(prompt_tokens=num_tokens, total_tokens=num_tokens)
    return EmbeddingList(object="list", data=data, model=body.model, usage=usage).to_json()


def mean_vector(total: Sequence[float], num_tokens: int, *, unit: bool) -> list[float]:
    """total / num_tokens, scaled to length 1 where `unit`. Raises EngineError where the states are not finite."""
    mean = [value / num_tokens for value in total]
    length = math.hypot(*mean)
    if not math.isfinite(length):
        raise EngineError("the model's states are not finite numbers")
    return [value / length for value in mean] if unit and length else mean


def encode_base64(vector: Sequence[float]) -> str:
    """float32, little-endian, as OpenAI's client reads it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
