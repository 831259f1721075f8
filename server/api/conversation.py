"""From a conversation to the plan of its answers: messages and tools through the chat template, what the text must
match, the parameters of sampling. Chats and /v1/responses come through here alike.

Not the answering (`server.api.chat`, `server.api.responses_api`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from server.api.answer import Plan, Prompt
from server.api.call_format import ToolFormat
from server.api.chat_request import ChatCompletionRequest, ChatMessage
from server.api.plan import encode_bad_words, make_plan, truncate
from server.api.sampling import build_params, check_prompt, first_given, resolve_max_tokens
from server.api.structured import compile_constraint, text_constraint
from server.api.tool_use import ToolUse, to_template, tool_format, tool_use
from server.api.tools import FunctionTool
from server.engine.engine import Engine
from server.errors import BadRequest
from server.tokenizer import Tokenizer

if TYPE_CHECKING:
    from server.service import Service


async def render(
    tokenizer: Tokenizer,
    messages: Sequence[ChatMessage],
    form: ToolFormat,
    *,
    tools: Sequence[FunctionTool] | None = None,
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Ids of a conversation. Raises BadRequest.

    `chat_template` replaces the model's; `variables` are what a template may use beside the messages.
    """
    template = first_given(chat_template, default=tokenizer.chat_template)
    plain, told = to_template(messages, tools, template, form)
    continued = bool(continue_final_message)
    return await asyncio.to_thread(
        tokenizer.render_chat,
        plain,
        add_generation_prompt=first_given(add_generation_prompt, default=not continued),
        continue_final_message=continued,
        chat_template=chat_template,
        variables={**(variables or {}), **told},
    )


def check_template(service: Service, body: ChatCompletionRequest) -> None:
    """Raise BadRequest for a template of the request's own where the operator has not allowed them."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise BadRequest(
            "this server does not run templates of requests; start it with --trust-request-chat-template, or leave "
            "chat_template out",
            param="chat_template",
            code="unsupported_value",
        )


async def plan_answers(
    body: ChatCompletionRequest,
    kind: str,
    service: Service,
    *,
    deadline_s: float | None,
    prompt_param: str = "messages",
    length_param: str | None = None,
) -> tuple[Plan, ToolUse | None]:
    """What is to be generated, and how its texts may call tools. `kind` begins the answer's id.

    The params are what errors call them. Raises BadRequest, Overloaded.
    """
    engine, tokenizer = service.ready()
    form = tool_format(service, tokenizer)
    use = await asyncio.to_thread(tool_use, body, form, tokenizer, text_constraint(body))
    grammar = await compile_constraint(body, service, None if use is None else use.constraint)
    prompt = await _prepare(body, engine, tokenizer, form, prompt_param, length_param)
    continuing = bool(body.continue_final_message)
    plan = make_plan(body, kind, [prompt], continuing=continuing, deadline_s=deadline_s, grammar=grammar)
    if use is not None and use.shows_control:
        plan = replace(plan, style=replace(plan.style, skip_special=False))
    return plan, use


async def _prepare(
    body: ChatCompletionRequest,
    engine: Engine,
    tokenizer: Tokenizer,
    form: ToolFormat,
    prompt_param: str,
    length_param: str | None,
) -> Prompt:
    """The rendered conversation with its parameters."""
    if length_param is None:
        length_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    ids = await render(
        tokenizer,
        body.messages,
        form,
        tools=None if body.tool_choice == "none" else body.tools,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        variables=body.template_variables,
    )
    check_prompt(ids, engine.info, param=prompt_param)
    asked = first_given(body.max_completion_tokens, body.max_tokens, default=None)
    ids = truncate(ids, body, engine.info, max_tokens=first_given(asked, default=1))
    max_tokens = resolve_max_tokens(
        asked,
        default=None,
        num_prompt_tokens=len(ids),
        info=engine.info,
        param=length_param,
        prompt_param=prompt_param,
    )
    logprobs = first_given(body.top_logprobs, default=0) if body.logprobs else None
    params = build_params(
        body,
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
        bad_words=await encode_bad_words(tokenizer, body.bad_words),
        defaults=tokenizer.sampling_defaults,
        info=engine.info,
    )
    return Prompt(ids, params)
