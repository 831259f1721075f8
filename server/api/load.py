"""GET /v1/load, and /load as vLLM has it: how busy the engine is, for routers that choose a replica by it.

The same numbers as gauges are in /metrics; these are one reading at one moment, as JSON.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.api.deps import ERRORS, ServiceDep, json_answer
from server.api.responses import Answer

router = APIRouter()


class Load(Answer):
    """A reading of the live engine. `server_load` is vLLM's name for the requests in progress: here, sequences."""

    server_load: int
    num_running: int
    num_waiting: int
    max_num_seqs: int  # that may run at once
    max_queue: int  # that may wait
    kv_usage: float  # 0..1, pages held by live sequences
    kv_tokens: int  # of the whole cache
    tokens_per_second: float  # generated, mean of the last ten seconds


@router.get("/v1/load", response_model=Load, responses=ERRORS)
@router.get("/load", response_model=Load, responses=ERRORS)
async def load(service: ServiceDep) -> Response:
    """How busy the engine is now, idle where it sleeps; 503 until it can take requests."""
    info, _ = service.facts()
    stats = service.stats()
    return json_answer(
        Load(
            server_load=stats.num_running + stats.num_waiting,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            max_num_seqs=info.max_num_seqs,
            max_queue=service.config.max_queue,
            kv_usage=round(stats.kv_usage, 6),
            kv_tokens=info.kv_tokens,
            tokens_per_second=service.metrics.tokens_per_second,
        )
    )
