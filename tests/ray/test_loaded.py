"""The start of a replica, without a cluster: it ends when the model serves, or fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed here: make test-scale")

from uvicorn.config import Config
from uvicorn.lifespan.on import LifespanOn

from server.errors import EngineError
from server.ray_app import Loaded, Replica, read_options

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"preset": "none", "device": "cpu", "threads": 1, "kv_memory": "8MiB", "drain_timeout": 0}


def test_the_start_lasts_until_the_model_serves(tmp_path: Path) -> None:
    args = {"model": str(ROOT / "demo" / "storyteller"), "cache_dir": str(tmp_path), **OPTIONS}

    async def live() -> None:
        app = Loaded(read_options(args, {}))
        lifespan = LifespanOn(Config(app, lifespan="on", log_config=None))
        await lifespan.startup()
        assert not lifespan.should_exit
        assert app.service.status().phase == "ready"
        replica = Replica()
        replica.app = app
        await replica.check_health()
        await lifespan.shutdown()
        assert app.service.status().phase == "draining"

    asyncio.run(live())


def test_a_model_that_is_not_there_fails_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = {"model": str(tmp_path / "nothing"), "cache_dir": str(tmp_path), **OPTIONS}

    async def live() -> None:
        lifespan = LifespanOn(Config(Loaded(read_options(args, {})), lifespan="on", log_config=None))
        await lifespan.startup()
        assert lifespan.should_exit

    asyncio.run(live())
    assert any("cannot serve" in record.getMessage() for record in caplog.records)


def test_ray_is_told_of_a_model_that_has_failed(tmp_path: Path) -> None:
    args = {"model": str(tmp_path / "nothing"), "cache_dir": str(tmp_path), **OPTIONS}

    async def live() -> None:
        replica = Replica()
        replica.app = Loaded(read_options(args, {}))
        replica.app.service.start()
        with pytest.raises(EngineError, match="could not be loaded"):
            await replica.app.service.wait_started()
        with pytest.raises(EngineError, match="neither a folder nor"):
            await replica.check_health()

    asyncio.run(live())
