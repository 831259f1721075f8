"""What the model's folder says about text: vocabulary, chat template, and its author's sampling defaults.

Not incremental (that is `server.detokenizer`) and no tokenizer of its own: `transformers` reads the files and renders
the chat template; this narrows it to what the server needs, makes it safe to call from several threads, and turns its
failures into answers a client can act on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from server.detokenizer import TokenBytes
from server.errors import BadRequest

logger = logging.getLogger(__name__)

# For a model that brings no template: plain turns, a style that base models continue sensibly.
DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

CONFIG_NAMES = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy",
                "model_max_length", "padding_side", "truncation_side")  # fmt: skip

# A template is a program of the model's author; these are what running it on a client's messages can raise.
TEMPLATE_FAILURES = (
    jinja2.TemplateError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The model author's choice for requests that do not say; None means: no choice."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingDefaults:
        """Read a generation_config.json; its values count only where it asks for sampling."""
        if not config.get("do_sample"):
            return cls()
        return cls(**{name: config.get(name) for name in cls.__slots__})


class Tokenizer:
    """Text and chats to ids, ids to bytes. All methods may be called from any thread."""

    def __init__(self, folder: Path, *, chat_template: Path | None = None, model_config: Any = None) -> None:
        """Read a model's folder; never the network. `chat_template` (a Jinja file) replaces the model's own.

        `model_config` is the model's configuration (`spq.architecture.read_spec`): transformers looks up the class of
        the tokenizer there, and without it reads it itself, at the price of 151 MiB (see `spq.llama_config`).

        Raises OSError or ValueError naming what is wrong with the files.
        """
        from transformers import AutoTokenizer  # seconds to import: not before the port is open

        config_file = folder / "generation_config.json"
        config = json.loads(config_file.read_text("utf-8")) if config_file.is_file() else {}
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,  # said aloud: without it, transformers asks on the terminal
            config=model_config,
        )
        self._lock = threading.Lock()  # sanitised encoding switches a setting of the shared backend
        self._bytes = TokenBytes(self._tokenizer)
        added = self._tokenizer.added_tokens_decoder
        self._special = frozenset(self._tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        self.has_chat_template = chat_template is not None or self._tokenizer.chat_template is not None
        override = None if chat_template is None else chat_template.read_text("utf-8")
        try:
            self.chat_template = _template_text(override, self._tokenizer)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"the chat template of {chat_template or folder} is broken at line {error.lineno}: {error.message}"
            ) from error
        self.sampling_defaults = SamplingDefaults.from_generation_config(config)
        eos = config.get("eos_token_id")
        ends = [self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        self.eos_token_ids = frozenset(token_id for token_id in ends if token_id is not None)

    def __len__(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return len(self._tokenizer)

    def info(self) -> dict[str, Any]:
        """What tokenizer_config.json says of the vocabulary, with the template in force; no paths of this machine."""
        tokenizer = self._tokenizer
        known = {name: tokenizer.init_kwargs[name] for name in CONFIG_NAMES if name in tokenizer.init_kwargs}
        tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return {
            **known,
            **tokens,
            "tokenizer_class": type(tokenizer).__name__,
            "chat_template": self.chat_template,
            "vocab_size": len(self),
            "added_tokens_decoder": {
                str(token_id): {"content": token.content, "special": token.special}
                for token_id, token in tokenizer.added_tokens_decoder.items()
            },
        }

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; `add_special_tokens` puts what the model expects in front (BOS)."""
        with self._lock:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation through the chat template, the model's or `chat_template`, in Jinja's sandbox.

        Control tokens spelled out in a message or in the `variables` (`documents` among them) are encoded as plain
        text, so a message cannot forge a turn. Raises BadRequest where the template fails.
        """
        try:
            with self._lock:
                ids = self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self.chat_template if chat_template is None else chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **(variables or {}),
                )
        except TEMPLATE_FAILURES as error:
            if chat_template is not None:
                raise BadRequest(f"chat_template fails: {str(error)[:500]}", param="chat_template") from error
            raise BadRequest(
                f"the model's chat template does not accept these messages: {str(error)[:500]}", param="messages"
            ) from error
        return list(ids)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes a token stands for; `first` where no text stands before it (some vocabularies drop a space)."""
        return self._bytes.of(token_id, first=first)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which text does not show."""
        return token_id in self._special

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; broken UTF-8 becomes U+FFFD."""
        shown = [i for i in token_ids if not (skip_special_tokens and i in self._special)]
        data = b"".join(self._bytes.of(token_id, first=i == 0) for i, token_id in enumerate(shown))
        return data.decode("utf-8", "replace")


def _template_text(override: str | None, tokenizer: Any) -> str:
    """The template in force, compiled once so that a broken one stops the start and not the first chat."""
    template = override
    if template is None and tokenizer.chat_template is not None:
        template = tokenizer.get_chat_template()
    if template is None:
        template = DEFAULT_CHAT_TEMPLATE
    probe = [{"role": "user", "content": "hello"}]
    try:
        tokenizer.apply_chat_template(probe, chat_template=template, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateSyntaxError:
        raise
    except TEMPLATE_FAILURES as error:
        logger.warning("the chat template does not accept a lone user message: %s", error)
    return template
