"""POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's form: what a prompt costs, and what ids mean."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from server.api.body import JSONRoute
from server.api.conversation import render
from server.api.deps import ERRORS, ServiceDep, check_model, encode, json_answer
from server.api.logprobs import token_label
from server.api.responses import DetokenizeAnswer, TokenizeAnswer, TokenizerInfo
from server.api.sampling import first_given
from server.api.text_request import DetokenizeRequest, TokenizeRequest
from server.api.tool_use import tool_format
from server.errors import BadRequest

router = APIRouter(route_class=JSONRoute)


@router.post("/tokenize", response_model=TokenizeAnswer, responses=ERRORS)
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> Response:
    """Ids of a text or of a rendered conversation."""
    check_model(service, body.model)
    info, tokenizer = service.facts()
    if body.prompt is not None:
        with_special = first_given(body.add_special_tokens, default=True)
        ids = await encode(tokenizer, body.prompt, add_special_tokens=with_special)
    else:
        ids = await render(
            tokenizer,
            body.messages or (),
            tool_format(service, tokenizer),
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
        )
    return json_answer(
        TokenizeAnswer(
            count=len(ids),
            max_model_len=info.max_model_len,
            tokens=ids,
            token_strs=[token_label(token_id, tokenizer) for token_id in ids] if body.return_token_strs else None,
        )
    )


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=ERRORS)
async def tokenizer_info(service: ServiceDep) -> Response:
    """The tokenizer's configuration, in the form of tokenizer_config.json."""
    _, tokenizer = service.facts()
    return json_answer(TokenizerInfo(**tokenizer.info()))


@router.post("/detokenize", response_model=DetokenizeAnswer, responses=ERRORS)
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> Response:
    """Text of ids, special tokens included."""
    check_model(service, body.model)
    info, tokenizer = service.facts()
    for token_id in body.tokens:
        if token_id >= info.vocab_size:
            raise BadRequest(f"token id {token_id} is outside the vocabulary of {info.vocab_size}", param="tokens")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_answer(DetokenizeAnswer(prompt=text))
