"""What is let in: hosts, pages, keys, sizes, pauses. Raw sockets, as clients of libraries behave."""

from __future__ import annotations

import base64
import json
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

KEY = "user:pässword"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, serving):
    """With a key, another name, a page elsewhere that may ask, and little patience."""
    from tightfit.runtime.server.guard import Door

    door = Door(
        api_key=KEY,
        secret="abc",
        hosts=("box.lan",),
        origins=("https://friend.example",),
        body_bytes=10_000,
        silence_seconds=0.3,
    )
    with serving(tmp_path_factory.mktemp("guarded"), door) as running:
        yield running


def asked(server, method="POST", path="/v1/tightfit/plan", **about) -> httpx.Response:
    return httpx.request(method, server.url + path, timeout=30, **about)


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


GOOD = {"X-API-Key": KEY.encode()}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic %%%"}, 401),
        (basic("user:wrong"), 401),
        (basic("pässword"), 401),
        ({"Authorization": f"Bearer {KEY}".encode()}, 200),
        (GOOD, 200),
        (basic(KEY), 200),
        (basic(f"anyone:{KEY}"), 200),
    ],
)
def test_a_key_opens_in_each_of_its_ways(guarded, headers, status):
    answer = asked(guarded, "GET", "/v1/tightfit/info", headers=headers)
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["error"]["type"] == "authentication_error"
        assert answer.headers["www-authenticate"].startswith("Basic")


def test_probes_need_no_key_and_metrics_do(guarded):
    assert [asked(guarded, "GET", path).status_code for path in ("/healthz", "/readyz", "/metrics")] == [
        200,
        200,
        401,
    ]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("evil.example:7860", 421),
        ("localhost.evil.example", 421),
        ("", 421),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:7860", 200),
        ("192.168.1.5:7860", 200),
        ("box.lan", 200),
    ],
)
def test_names_that_are_not_ours_are_refused(guarded, host, status):
    answer = asked(guarded, "GET", "/v1/tightfit/info", headers={**GOOD, "Host": host})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 400),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, 400),
        ({}, 400),
    ],
)
def test_pages_elsewhere_change_nothing_here(guarded, headers, status):
    """400 is what the API says of the body, so the request came to it."""
    answer = asked(guarded, headers={**GOOD, **headers}, json={"width": 0})
    assert answer.status_code == status
    assert ("access-control-allow-origin" in answer.headers) == ("friend" in headers.get("Origin", ""))


def test_our_own_page_may_ask(guarded):
    here = {"Origin": guarded.url, "Host": urlsplit(guarded.url).netloc}
    assert asked(guarded, headers={**GOOD, **here}, json={"width": 0}).status_code == 400


def test_browsers_learn_before_they_ask(guarded):
    wish = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    told = asked(guarded, "OPTIONS", headers={"Origin": "https://friend.example", **wish})
    assert (told.status_code, told.headers["access-control-allow-headers"]) == (204, "authorization")
    assert told.headers["access-control-allow-origin"] == "https://friend.example"
    assert asked(guarded, "OPTIONS", headers={"Origin": "https://evil.example", **wish}).status_code == 403


def test_bodies_are_bounded_with_and_without_their_length(guarded):
    large = json.dumps({"prompt": "a" * 20_000}).encode()
    assert asked(guarded, headers=GOOD, content=large).status_code == 413
    assert asked(guarded, headers=GOOD, content=iter([large[:8000], large[8000:]])).status_code == 413
    small = json.dumps({"prompt": "a" * 8_000, "width": 0}).encode()
    assert asked(guarded, headers=GOOD, content=iter([small])).status_code == 400
    assert asked(guarded, headers=GOOD, content=b"", method="GET", path="/readyz").status_code == 200


def test_a_body_that_does_not_end_is_given_up(guarded):
    url = urlsplit(guarded.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        head = f"POST /v1/tightfit/plan HTTP/1.1\r\nHost: {url.netloc}\r\nX-API-Key: ".encode() + KEY.encode()
        client.sendall(head + b"\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in client.recv(4096).split(b"\r\n")[0]


def test_why_a_body_is_refused_reaches_who_sends_all_of_it(guarded):
    url, content = urlsplit(guarded.url), b"a" * 2**22
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        head = f"POST /v1/tightfit/plan HTTP/1.1\r\nHost: {url.netloc}\r\nX-API-Key: ".encode() + KEY.encode()
        client.sendall(head + f"\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
        answered = b"".join(iter(lambda: client.recv(4096), b""))  # a reset is raised
    assert answered.startswith(b"HTTP/1.1 413 ") and b"a request has at most" in answered


def test_jobs_that_wait_hold_no_bodies(guarded):
    """Twice as many as are read at once."""
    about = {"num_inference_steps": 900, "width": 64, "height": 64}
    body = {"prompt": "a", "user": "a" * 9000, **about}
    with httpx.Client(base_url=guarded.url, headers=GOOD, timeout=30) as client, ExitStack() as waiting:
        for _ in range(16):
            asking = client.stream("POST", "/v1/images/generations", json={**body, "stream": True})
            assert waiting.enter_context(asking).status_code == 200
        for ticket in guarded.service.active:
            ticket.cancel()


@pytest.mark.parametrize("begun", [b"", b"GET /healthz HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_end_is_given_up(guarded, begun):
    url = urlsplit(guarded.url)
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        if begun:  # after a request on the same connection
            client.sendall(f"GET /healthz HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode() + begun)
        answered = b"".join(iter(lambda: client.recv(4096), b""))  # until it is closed
        assert (b" 200 OK" in answered) == bool(begun)


def test_a_client_that_leaves_in_its_body_leaves_nothing(guarded):
    url = urlsplit(guarded.url)
    for _ in range(100):  # each would hold its bytes
        with socket.create_connection((url.hostname, url.port), timeout=10) as client:
            head = f"POST /v1/tightfit/plan HTTP/1.1\r\nHost: {url.netloc}\r\nX-API-Key: ".encode()
            client.sendall(head + KEY.encode() + b"\r\nContent-Length: 9000\r\n\r\n" + b"a" * 4000)
    answers = (asked(guarded, headers=GOOD, json={"width": 0}).status_code for _ in range(1000))
    assert next(status for status in answers if status != 503) == 400  # once all are seen to leave


def test_answers_forbid_what_a_browser_need_not_do(guarded):
    headers = asked(guarded, "GET", "/healthz").headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_signed_address_opens_a_picture_and_nothing_else(guarded):
    """404 is what the API says, so the request came to it."""
    from tightfit.runtime.server.guard import Door

    signed = Door(api_key=KEY, secret="abc").signed("/v1/tightfit/jobs/nothing/pictures/1")
    other = signed.replace("/pictures/1", "/pictures/2")
    statuses = [asked(guarded, "GET", path).status_code for path in (signed, other, signed.split("?")[0])]
    assert statuses == [404, 401, 401]
    assert asked(guarded, "DELETE", signed).status_code == 401
