"""One example of each request and answer, for the OpenAPI document. A test sends each request and reads each answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ID = "0123456789abcdef0123456789abcdef"
CREATED = 1795336698
USAGE = {
    "prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 0},
}  # fmt: skip
ERRORS = {
    "4XX": {
        "message": "temperature: should be less than or equal to 2 (got 9)", "type": "invalid_request_error",
        "param": "temperature", "code": "invalid_value",
    },
    "5XX": {
        "message": "the model is not ready: compressing layer 3/32, 9% done", "type": "overloaded_error",
        "param": None, "code": "model_loading",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """Of one operation. `stream` is what the answer is with stream: true, where there is one."""

    response: Any
    request: dict[str, Any] | None = None
    stream: str | None = None


COMPLETION = {
    "id": f"cmpl-{ID}", "object": "text_completion", "created": CREATED, "model": "storyteller",
    "choices": [
        {"index": 0, "text": " there was a band", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ],
    "usage": USAGE,
}  # fmt: skip
CHAT = {
    "id": f"chatcmpl-{ID}", "object": "chat.completion", "created": CREATED, "model": "storyteller",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "What do you see?", "refusal": None},
            "logprobs": None, "finish_reason": "stop", "stop_reason": None,
        }
    ],
    "usage": USAGE,
}  # fmt: skip
TEXT_STREAM = (
    f'data: {{"id":"cmpl-{ID}","object":"text_completion","created":{CREATED},"model":"storyteller","choices":'
    '[{"index":0,"text":" there","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
    "data: [DONE]\n\n"
)
CHAT_STREAM = (
    f'data: {{"id":"chatcmpl-{ID}","object":"chat.completion.chunk","created":{CREATED},"model":"storyteller",'
    '"choices":[{"index":0,"delta":{"content":"What"},"logprobs":null,"finish_reason":null}]}\n\n'
    "data: [DONE]\n\n"
)
MESSAGE = {
    "type": "message", "id": f"msg_{ID}", "status": "completed", "role": "assistant",
    "content": [{"type": "output_text", "text": "What do you see?", "annotations": [], "logprobs": []}],
}  # fmt: skip
RESPONSE = {
    "id": f"resp_{ID}", "object": "response", "created_at": CREATED, "status": "completed", "background": False,
    "error": None, "incomplete_details": None, "instructions": None, "max_output_tokens": 40, "metadata": {},
    "model": "storyteller", "output": [MESSAGE], "parallel_tool_calls": True, "previous_response_id": None,
    "store": True, "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled",
    "usage": {
        "input_tokens": 11, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 15,
    },
}  # fmt: skip
RESPONSE_STREAM = (
    'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":4,"delta":"What",'
    f'"logprobs":[],"item_id":"msg_{ID}","output_index":0,"content_index":0}}\n\n'
)
ANTHROPIC = {
    "id": f"msg_{ID}", "type": "message", "role": "assistant", "model": "storyteller",
    "content": [{"type": "text", "text": "What do you see?"}], "stop_reason": "end_turn", "stop_sequence": None,
    "usage": {
        "input_tokens": 11, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 4,
    },
}  # fmt: skip
ANTHROPIC_STREAM = (
    'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta",'
    '"text":"What"}}\n\n'
)
CARD = {
    "id": "storyteller", "object": "model", "created": CREATED, "owned_by": "spq-serve", "root": "demo/storyteller",
    "max_model_len": 1024, "spq": {"kv_tokens": 65536, "max_num_seqs": 64, "backend": "native"},
}  # fmt: skip
LOAD = {
    "server_load": 3, "num_running": 3, "num_waiting": 0, "max_num_seqs": 64, "max_queue": 256, "kv_usage": 0.12,
    "kv_tokens": 65536, "tokens_per_second": 310.4,
}  # fmt: skip

EXAMPLES: dict[tuple[str, str], Example] = {
    ("post", "/v1/completions"): Example(
        COMPLETION,
        {"model": "storyteller", "prompt": "It was a cold and rainy night, and", "max_tokens": 4, "temperature": 0.7},
        TEXT_STREAM,
    ),
    ("post", "/v1/chat/completions"): Example(
        CHAT,
        {
            "model": "storyteller",
            "messages": [{"role": "user", "content": "The captain looked at the sea and said,"}],
            "max_completion_tokens": 40,
            "seed": 3,
        },
        CHAT_STREAM,
    ),
    ("post", "/v1/responses"): Example(
        RESPONSE, {"model": "storyteller", "input": "The captain said,", "max_output_tokens": 40}, RESPONSE_STREAM
    ),
    ("get", "/v1/responses/{response_id}"): Example(RESPONSE),
    ("delete", "/v1/responses/{response_id}"): Example({"id": f"resp_{ID}", "object": "response", "deleted": True}),
    ("post", "/v1/messages"): Example(
        ANTHROPIC,
        {
            "model": "storyteller",
            "max_tokens": 40,
            "messages": [{"role": "user", "content": "The captain looked at the sea and said,"}],
        },
        ANTHROPIC_STREAM,
    ),
    ("post", "/v1/messages/count_tokens"): Example(
        {"input_tokens": 11},
        {"model": "storyteller", "messages": [{"role": "user", "content": "The captain looked at the sea and said,"}]},
    ),
    ("post", "/v1/embeddings"): Example(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.0312, -0.0119, 0.0527]}],
            "model": "storyteller",
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        },
        {"model": "storyteller", "input": ["the sea"], "encoding_format": "float"},
    ),
    ("post", "/tokenize"): Example(
        {"count": 2, "max_model_len": 1024, "tokens": [264, 745], "token_strs": ["the", " sea"]},
        {"prompt": "the sea", "return_token_strs": True},
    ),
    ("post", "/detokenize"): Example({"prompt": "the sea"}, {"tokens": [1, 2]}),
    ("get", "/tokenizer_info"): Example(
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tokenizer_class": "LlamaTokenizerFast",
            "chat_template": "{% for message in messages %}...{% endfor %}",
            "vocab_size": 4096,
            "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        }
    ),
    ("get", "/v1/load"): Example(LOAD),
    ("get", "/load"): Example(LOAD),
    ("get", "/v1/models"): Example({"object": "list", "data": [CARD]}),
    ("get", "/v1/models/{model_id}"): Example(CARD),
    ("get", "/health"): Example({"status": "ok"}),
    ("get", "/ready"): Example({"phase": "ready", "progress": 1.0, "detail": "", "elapsed_s": 3.2, "eta_s": None}),
    ("get", "/metrics"): Example('vllm:num_requests_running{engine="0",model_name="storyteller"} 3.0\n'),
    ("post", "/admin/reload"): Example({"phase": "ready", "seconds": 2.41}, {}),
    ("post", "/admin/drain"): Example({"phase": "drained", "seconds": 0.87}, {}),
    ("post", "/admin/sleep"): Example({"phase": "sleeping", "seconds": 0.05}, {"wait": True}),
    ("post", "/admin/wake"): Example({"phase": "ready", "seconds": 2.38}, {}),
    ("get", "/version"): Example({"version": "0.1.0"}),
}
