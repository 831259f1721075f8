"""Everything between an open port and a ready engine, in order. Imported late: it brings torch and transformers.

Not the state of start-up (`server.progress` keeps it): this only calls the steps and reports them.
"""

from __future__ import annotations

from dataclasses import replace

from server.config import ServerConfig
from server.engine.build import build_engine, pick_device
from server.engine.engine import Engine
from server.engine.loop import OnStep
from server.engine.memory import MemoryBudgetError
from server.model.resolve import prepare_folder
from server.progress import Report, StartUpError
from server.tokenizer import Tokenizer
from spq.architecture import read_spec
from spq.errors import SpqError


def start_up(config: ServerConfig, report: Report, *, on_step: OnStep) -> tuple[Engine, Tokenizer]:
    """Find, compress if needed, load. The engine is not started.

    Raises StartUpError for what the operator can mend; anything else is a defect and keeps its traceback.
    """
    try:
        folder = prepare_folder(config, pick_device(config), report)
        model_config = read_spec(folder).config
        tokenizer = Tokenizer(folder, chat_template=config.chat_template, model_config=model_config)
        engine = build_engine(
            folder,
            config,
            progress=lambda phase, done: report(phase, done, "", None),
            on_step=on_step,
        )
    except (SpqError, MemoryBudgetError, OSError, ValueError) as error:
        raise StartUpError(str(error)) from error
    # a chat model ends its turns by tokens that only its generation_config.json may name
    ends = {*engine.info.eos_token_ids, *(i for i in tokenizer.eos_token_ids if i < engine.info.vocab_size)}
    engine.info = replace(engine.info, eos_token_ids=tuple(sorted(ends)))
    return engine, tokenizer
