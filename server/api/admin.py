"""What operators, load balancers and clients ask before they send work: health, readiness, metrics, models, version."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from server.api.deps import ERRORS, ServiceDep, check_model, json_answer
from server.api.docs import package_version
from server.api.failures import error_response
from server.api.responses import ModelCard, ModelList, Readiness
from server.errors import Unhealthy

if TYPE_CHECKING:
    from server.service import Service

router = APIRouter()

STALLED_AFTER_S = 120.0  # a loop with work that has not turned for so long hangs; slow CPUs take seconds a step
RETRY_AFTER_S = 10


@router.get("/health", responses=ERRORS)
async def health(service: ServiceDep) -> Response:
    """200 while the process is worth keeping, also during start-up; 503 when only a restart helps."""
    problem = find_problem(service)
    return JSONResponse({"status": "ok"}) if problem is None else error_response(Unhealthy(problem))


@router.get("/ready", response_model=Readiness, responses={503: {"model": Readiness}})
async def ready(service: ServiceDep) -> Response:
    """200 where requests would be served now, or wait for a model that sleeps or is loaded again; else 503. Always the
    phase and how far it is."""
    status = service.status()
    problem = find_problem(service)
    answer = Readiness(
        phase=status.phase,
        progress=status.progress,
        detail=problem or status.detail,
        elapsed_s=round(status.elapsed_s, 3),
        eta_s=None if status.eta_s is None else round(status.eta_s, 3),
    )
    if status.accepts and problem is None:
        return json_answer(answer)
    wait_s = RETRY_AFTER_S if status.eta_s is None else max(1, round(status.eta_s))
    return json_answer(answer, status=503, headers={"Retry-After": str(wait_s)})


@router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Prometheus text, from the first second."""
    return Response(service.metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": package_version()}


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def list_models(service: ServiceDep) -> Response:
    """The served names, all of one model."""
    service.facts()
    return json_answer(ModelList(object="list", data=[_card(service, name) for name in service.served_names]))


@router.get("/v1/models/{model_id:path}", response_model=ModelCard, responses=ERRORS)
async def retrieve_model(model_id: str, service: ServiceDep) -> Response:
    """One served name."""
    check_model(service, model_id)
    return json_answer(_card(service, model_id))


def _card(service: Service, name: str) -> ModelCard:
    info, _ = service.facts()
    status = service.status()
    return ModelCard(
        id=name,
        object="model",
        created=int(time.time() - status.elapsed_s),
        owned_by="spq-serve",
        root=service.config.model,
        max_model_len=info.max_model_len,
        spq={
            "kv_tokens": info.kv_tokens,
            "max_num_seqs": info.max_num_seqs,
            "dtype": info.dtype,
            "kv_dtype": info.kv_dtype,
            "device": info.device,
            "backend": info.backend,
            "memory_bytes": info.ledger,
            "compression": info.compression,
        },
    )


def find_problem(service: Service) -> str | None:
    """Why the process should be restarted, or None."""
    status = service.status()
    if status.phase == "failed":
        return status.error or "the engine has failed"
    if service.engine is None or not service.door.is_open or status.phase == "draining":
        return None
    stats = service.engine.stats()
    if not stats.alive:
        return "the engine stopped after an error; see the log"
    silence_s = time.monotonic() - stats.last_step_s
    if stats.num_running + stats.num_waiting > 0 and silence_s > STALLED_AFTER_S:
        return f"the engine has work but has not finished a step for {silence_s:.0f} s"
    return None
