"""What the routes of the page send, without a browser: files, types, the policy, and who is sent what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import ServerConfig
from server.page.router import MEDIA_TYPES
from server.service import Service

FILES = Path(__file__).resolve().parents[3] / "server" / "page" / "static"
HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    """An app that has not started and wants a key: the page must not depend on either."""
    app = create_app(Service(ServerConfig(model="models/none", api_keys=("secret",))))
    yield TestClient(app)


def test_browsers_get_the_page_and_programs_get_paths(client: TestClient) -> None:
    page = client.get("/", headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<title>spq-serve</title>" in page.text
    plain = client.get("/", headers={"Accept": "*/*"})
    assert plain.headers["content-type"] == "application/json"
    assert page.headers["vary"] == plain.headers["vary"] == "Accept"
    schema = client.get("/openapi.json").json()["paths"]
    for path in plain.json().values():
        assert path in schema or client.get(path).status_code == 200
    assert client.get("/v1/models").status_code == 401, "only the page is open"


def test_the_policy_allows_this_origin_alone(client: TestClient) -> None:
    for path in ("/", "/page/app.js", "/page/base.css", "/page/icon.svg"):
        answer = client.get(path, headers=HTML)
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules.pop("default-src") == "'none'"
        assert rules.pop("require-trusted-types-for") == "'script'"
        assert set(rules.values()) == {"'self'", "'none'"}, "no unsafe-inline, no other host"
        assert rules["frame-ancestors"] == rules["form-action"] == rules["base-uri"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_every_file_is_sent_with_its_type(client: TestClient, path: Path) -> None:
    answer = client.get(f"/page/{path.name}")
    assert answer.content == path.read_bytes()
    assert answer.headers["content-type"] == MEDIA_TYPES[path.suffix]
    again = client.get(f"/page/{path.name}", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(f"/page/{path.name}").headers["content-length"] == str(len(answer.content))


@pytest.mark.parametrize("name", ["none.js", "..%2frouter.py", "%2e%2e%2frouter.py", "router.py", "static", ""])
def test_other_names_are_404(client: TestClient, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_files_follow_the_rules_of_the_house(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 300
    for markup in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert markup not in text, f"{path.name}: {markup}"
    assert re.findall(r"https?://(?!www\.w3\.org/)[^\s\"'`]+", text) == [], "nothing is loaded from elsewhere"
    if path.suffix == ".html":
        assert not re.search(r"\sstyle=|\son\w+=|<script(?![^>]*\bsrc=)|<style", text), "the policy forbids inline code"
