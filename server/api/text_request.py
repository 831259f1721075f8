"""The bodies of POST /tokenize and /detokenize, in vLLM's form."""

from __future__ import annotations

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.chat_request import ChatMessage, check_messages
from server.api.fields import Text, TokenId
from server.api.protocol import Strict
from server.api.tools import Tools


class TokenizeRequest(Strict):
    """POST /tokenize: a text or a conversation, in vLLM's form."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("prompt", "send either prompt or messages", {"param": "prompt"})
        for name in ("add_generation_prompt", "continue_final_message", "tools"):
            if self.prompt is not None and getattr(self, name) is not None:
                raise PydanticCustomError(name, "{param} needs messages", {"param": name})
        check_messages(self.messages or ())
        if self.messages is not None and self.add_special_tokens:
            raise PydanticCustomError(
                "add_special_tokens",
                "a chat template writes its own special tokens; add_special_tokens needs prompt",
                {"param": "add_special_tokens"},
            )
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
