"""The body of POST /v1/completions. What it shares with chat is in `server.api.protocol`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import Logprobs, Prompts, TokenCount, not_served
from server.api.protocol import GenerationBody, refusal


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: TokenCount | None = None
    logprobs: Logprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    best_of: Any = None
    suffix: Annotated[Any, not_served("")] = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise refusal("max_tokens", "max_tokens 0 needs echo: true; ask for at least 1 token")
        if self.logprob_token_ids is not None and (self.logprobs is None or self.max_tokens == 0):
            raise refusal("logprob_token_ids", "logprob_token_ids needs logprobs, and at least 1 token to score")
        if self.best_of is not None and (type(self.best_of) is not int or self.best_of != (self.n or 1)):
            raise PydanticCustomError(
                "not_served", "best_of is not served; leave it out or send the value of n", {"param": "best_of"}
            )
        return self
