"""What docs/security.md promises and no other test holds: remote code, templates, CORS, TLS."""

from __future__ import annotations

import contextlib
import json
import re
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import REPOSITORY, random_model
from starlette.testclient import TestClient
from transformers import AutoConfig, AutoTokenizer

from server.app import create_app
from server.cli import main
from server.config import ServerConfig
from server.errors import BadRequest
from server.listener import make_server
from server.service import Service
from server.tokenizer import Tokenizer
from spq.architecture import read_spec
from spq.calibrate import CalibrationError, tokenize
from spq.errors import SpqError

DEMO = REPOSITORY / "demo" / "storyteller"
PAGE = (REPOSITORY / "docs" / "security.md").read_text("utf-8")
ORIGIN = "https://chat.example"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder that brings its own classes; importing them leaves a file `ran` in it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what an absent-minded operator would type
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "model"
    random_model("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (folder / "planted.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Mine: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "planted.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["planted.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_folder_cannot_bring_a_tokenizer_class(planted: Path) -> None:
    (planted / "config.json").unlink()
    with pytest.raises((ValueError, OSError)):
        Tokenizer(planted)
    with pytest.raises(CalibrationError):
        tokenize(planted, "text")
    assert not (planted / "ran").exists()
    with contextlib.suppress(AttributeError):  # the class is none, but it was imported: the plant works
        AutoTokenizer.from_pretrained(planted, trust_remote_code=True)
    assert (planted / "ran").exists()


def test_a_folder_cannot_bring_a_model_class(planted: Path) -> None:
    with pytest.raises(SpqError):
        read_spec(planted)
    assert not (planted / "ran").exists()
    with contextlib.suppress(AttributeError):
        AutoConfig.from_pretrained(planted, trust_remote_code=True)
    assert (planted / "ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_template_is_sandboxed(tmp_path: Path, template: str) -> None:
    override = tmp_path / "hostile.jinja"
    override.write_text(template)
    tokenizer = Tokenizer(DEMO, chat_template=override)
    with pytest.raises(BadRequest):
        tokenizer.render_chat([{"role": "user", "content": "x"}])


def test_a_message_is_no_template(tmp_path: Path) -> None:
    override = tmp_path / "plain.jinja"
    override.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = Tokenizer(DEMO, chat_template=override)
    ids = tokenizer.render_chat([{"role": "user", "content": "{{ 7 * 7 }}"}])
    assert "7 * 7" in tokenizer.decode(ids) and "49" not in tokenizer.decode(ids)


def browser(*origins: str) -> TestClient:
    service = Service(ServerConfig(model="m", api_keys=("a",), cors_origins=origins))
    return TestClient(create_app(service))  # not entered: nothing is loaded


PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


def test_pages_may_not_call_unless_told() -> None:
    client = browser()
    for response in (client.options("/v1/completions", headers=PREFLIGHT), client.get("/ready", headers=PREFLIGHT)):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert client.options("/v1/completions", headers=PREFLIGHT).status_code == 401


@pytest.mark.parametrize(("allowed", "told"), [(ORIGIN, ORIGIN), ("*", "*")])
def test_pages_of_an_allowed_origin_may_call(allowed: str, told: str) -> None:
    client = browser(allowed)
    response = client.options("/v1/completions", headers=PREFLIGHT)
    assert response.status_code == 200, "a preflight brings no key"
    assert response.headers["access-control-allow-origin"] == told
    assert "x-stainless-os" in response.headers["access-control-allow-headers"].lower(), "clients add such"
    assert "access-control-allow-credentials" not in response.headers
    refused = client.post("/v1/completions", json={}, headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, told)
    assert "X-Request-Id" in refused.headers["access-control-expose-headers"]


def test_pages_of_another_origin_may_not_call() -> None:
    client = browser(ORIGIN)
    response = client.options("/v1/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"})
    assert response.status_code == 400 and "access-control-allow-origin" not in response.headers
    response = client.get("/ready", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_pages_may_read_what_is_left_of_their_limits() -> None:
    config = ServerConfig(
        model="m", api_keys=("a",), cors_origins=(ORIGIN,), requests_per_minute=9, tokens_per_minute=99
    )
    client = TestClient(create_app(Service(config)))
    headers = {"Origin": ORIGIN, "Authorization": "Bearer a"}
    answer = client.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    sent = [name for name in answer.headers if name.startswith("x-ratelimit-")]
    told = answer.headers["access-control-expose-headers"].lower().split(", ")
    assert len(sent) == 4 and set(sent) <= set(told)
    assert {"x-request-id", "retry-after"} <= set(told)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return cert, key


def test_https(certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate
    service = Service(ServerConfig(model="m", port=0, tls_cert=cert, tls_key=key))
    monkeypatch.setattr(service, "start", lambda: None)  # the model is not what is asked for here
    server = make_server(service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end_s = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end_s
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    trusted = ssl.create_default_context(cafile=str(cert))
    try:
        answer = httpx.get(f"https://127.0.0.1:{port}/health", verify=trusted, timeout=10)
        assert answer.json() == {"status": "ok"}
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"https://127.0.0.1:{port}/health", timeout=10)  # signed by nobody we know
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-cert", "{cert}"], "--tls-cert and --tls-key belong together"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}.none"], "--tls-key: Path does not point to a file"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}"], "spq-serve: "),
        (["--tokens-per-minute", "5"], "limits per minute count by API key"),
        (["--api-key-file", "{cert}"], "is no TOML"),
        (["--api-key", "a=1", "--api-key", "a=2"], "two API keys have the name a"),
    ],
)
def test_wrong_files_end_with_one_line(
    options: list[str], message: str, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--model", "m", *(option.replace("{cert}", str(certificate[0])) for option in options)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_defaults_are_the_safe_ones() -> None:
    config = ServerConfig(model="m")
    assert config.host == "127.0.0.1"
    assert config.cors_origins == () and config.max_body_bytes == 8 * 1024**2


def test_the_page_names_tests_that_exist() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 20
    found: dict[str, str] = {}
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        found[path.name] = found.get(path.name, "") + path.read_text("utf-8")
    missing: list[Any] = [pair for pair in named if f"def {pair[1]}(" not in found.get(pair[0], "")]
    assert not missing
