"""Our own API, over HTTP, beside the pipeline in Python."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from io import BytesIO

import httpx
import pytest
import tightfit
from PIL import Image

SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}
HEART = {"prompt": "a red heart", "seed": 7, **SMALL}
LONG = {"prompt": "a red heart", "num_inference_steps": 900, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def own(server):
    with httpx.Client(base_url=f"{server.url}/v1/tightfit", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def local():
    with tightfit.load("emoji", device="cpu", precision="fp32", residency="resident") as pipe:
        yield pipe


def events(own, job: dict, **params) -> list[dict]:
    with own.stream("GET", f"jobs/{job['id']}/events", params=params) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def submitted(own, **asked) -> dict:
    answer = own.post("jobs", json=asked)
    assert answer.status_code == 202, answer.text
    return answer.json()


def picture(own, job: dict, number: int = 1) -> Image.Image:
    return Image.open(BytesIO(own.get(f"jobs/{job['id']}/pictures/{number}").content))


def file_of(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_a_job_from_its_wish_to_its_picture(own, local):
    job = submitted(own, **HEART, preview_every=1)
    seen = events(own, job, previews=True)
    assert [one["state"] for one in (seen[0], seen[-1])] in (["waiting", "done"], ["running", "done"])
    assert any(one["preview"] for one in seen)
    last = seen[-1]
    assert last["done"] == 1 and last["summary"]["request"]["seed"] == 7
    assert last["pictures"] == [f"/v1/tightfit/jobs/{job['id']}/pictures/1"]
    painted = picture(own, job)
    assert painted.convert("RGB").tobytes() == local(**HEART).tobytes()
    assert painted.info["parameters"].startswith("a red heart\nSteps: 2")
    assert own.get(f"jobs/{job['id']}").json()["state"] == "done"
    assert own.get(f"jobs/{job['id']}/pictures/2").status_code == 404


def test_a_form_and_json_ask_the_same(own, local):
    given = local("a pizza", seed=1, **SMALL)
    options = {**HEART, "strength": 0.7, "lora": ["flat:0.5"]}
    encoded = base64.b64encode(file_of(given)).decode()
    jobs = [submitted(own, **options, image=encoded)]
    answer = own.post("jobs", data=options, files={"image": ("a.png", file_of(given), "image/png")})
    jobs.append(answer.json())
    for job in jobs:
        last = events(own, job)[-1]
        assert (last["state"], last["given"]) == ("done", ["image"]), last["error"]
        expected = local("a red heart", image=given, lora="flat:0.5", strength=0.7, seed=7, **SMALL)
        assert picture(own, job).convert("RGB").tobytes() == expected.tobytes()


def test_what_is_cancelled_ends_and_what_is_stopped_keeps_its_pictures(own):
    running, waiting = submitted(own, **LONG), submitted(own, **LONG)
    assert own.get(f"jobs/{waiting['id']}").json()["position"] == 1
    assert own.delete(f"jobs/{waiting['id']}").status_code == 200
    own.delete(f"jobs/{running['id']}")
    assert {events(own, job)[-1]["state"] for job in (running, waiting)} == {"cancelled"}
    stopped = submitted(own, **LONG | {"num_inference_steps": 30, "num_images": 100})
    while not own.get(f"jobs/{stopped['id']}").json()["pictures"]:
        time.sleep(0.01)
    own.post(f"jobs/{stopped['id']}/stop")
    last = events(own, stopped)[-1]
    assert last["state"] == "stopped" and 0 < len(last["pictures"]) < 100
    assert picture(own, stopped).size == (64, 64)


def test_history_is_paged_newest_first(own):
    ids = [submitted(own, **HEART)["id"] for _ in range(3)]
    events(own, {"id": ids[-1]})
    first = own.get("jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["jobs"]] == [ids[2], ids[1]]
    second = own.get("jobs", params={"limit": 2, "before": first["next"]}).json()
    assert second["jobs"][0]["id"] == ids[0]


def test_a_plan_is_the_tables_that_the_planner_makes(own, local):
    told = own.post("plan", json={"prompt": "a red heart", "width": 64, "height": 64}).json()
    plans = local.plans(tightfit.Request("a red heart", width=64, height=64))
    assert [plan["predicted"]["stages"] for plan in told["passes"][0]["plans"]] == [
        dict(plan.predicted.stages) for plan in plans
    ]
    assert told["fits"] and told["peak_bytes"] == plans[0].predicted.peak_bytes
    other = [plan for plan in told["passes"][0]["plans"] if plan["fits"]][-1]
    again = own.post("plan", json={"width": 64, "height": 64, **other["wishes"]}).json()
    assert again["passes"][0]["plans"][0]["summary"] == other["summary"] != plans[0].summary(), again


def test_a_plan_for_another_card_also_of_what_does_not_fit(own):
    told = own.post("plan", json={"hardware": "rtx-2060", "width": 64, "height": 64, "hires": 2}).json()
    assert told["device"] == "cuda" and [len(one["plans"]) > 0 for one in told["passes"]] == [True, True]
    tight = own.post("plan", json={"hardware": "rtx-2060", "budget": "290MiB", "width": 512, "height": 512})
    tight = tight.json()
    assert not tight["fits"] and "does not fit" in tight["error"]
    assert {plan["verdict"] for plan in tight["passes"][0]["plans"]} == {"too large"}


def test_what_there_is(own, server):
    named = {model["name"]: model for model in own.get("models").json()["models"]}
    assert named["emoji"]["fits"] and named["flat"]["kind"] == "LoRA" and "path" not in named["emoji"]
    info = own.get("info").json()
    assert info["machine"]["device"] == "cpu" and info["limits"]["waiting"] == 100
    told = httpx.get(f"{server.url}/metrics").text
    assert 'tightfit_jobs_total{state="done"}' in told and "tightfit_budget_bytes" in told


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "no prompt was given"),
        ({"promt": "x"}, "did you mean prompt"),
        ({"prompt": "a", "steps": 3}, "it is num_inference_steps"),
        ({"prompt": "a", "lora": ["flat:1"] * 101}, "lora has 101 items, where 100 are taken"),
        ({"prompt": "a", "control_image": ["QUFB"] * 9}, "control_image has 9 items, where 8"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"prompt": "a", "model": "../emoji"}, "is called"),
        ({"prompt": "a", "model": "/etc/passwd"}, "is called"),
        ({"prompt": "a", "model": "a\0b"}, "is called"),
        ({"prompt": "a", "lora": ["/etc/passwd:1"]}, "is called"),
        ({"prompt": "a", "image": "http://localhost/a.png"}, "addresses are not fetched|not valid base64"),
        ({"prompt": "a", "image": "data:image/png;base64,QUFB"}, "no picture that can be read"),
        ({"prompt": "a", "width": 10**30}, "width|JSON"),
        ({"prompt": "a", "width": 2**16, "height": 2**16}, "pixels are asked for"),
        ({"prompt": "a", "precision": "fp1"}, "unknown precision"),
        ({"prompt": "a", "does": "explode"}, "paint or upscale"),
        ({"prompt": "a", "does": "upscale"}, "upscaler"),
        ({"prompt": "a", "priority": 5000}, "from -1000 to 1000"),
        ({"prompt": "a", "priority": True}, "from -1000 to 1000"),
        ({"prompt": "a", "step_cache": True}, "step_cache must be a whole number from 1 to 10, not True"),
        (
            {"prompt": "a", "guidance_scale": False},
            "guidance_scale must be a number from 0 to 1000, not False",
        ),
        ({"prompt": "a", "backend": "onnx"}, "no weights that onnx reads: export it with --to onnx"),
        ({"prompt": "a", "control": ["/etc/passwd"]}, "unknown option"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(own, asked, said):
    import re

    answer = own.post("jobs", json=asked)
    text = answer.json()["error"]["message"]
    assert answer.status_code == 400 and re.search(said, text) and "\n" not in text, text


def test_a_picture_beyond_the_limit_is_refused_by_its_header(own):
    header = file_of(Image.new("1", (4097, 4096)))[:50]  # and nothing of its pixels
    answer = own.post("plan", json={"image": base64.b64encode(header).decode()})
    assert "image has 4097x4096 pixels" in answer.json()["detail"] and "16777216" in answer.json()["detail"]


def test_values_without_number_are_not_parsed(own):
    answer = own.post("plan", content=b'{"nope": [' + b"[]," * 2**17 + b"[]]}")
    assert answer.status_code == 413 and "values" in answer.json()["detail"]


def test_bodies_and_records_are_read_beside_the_loop(own, monkeypatch):
    from tightfit.runtime.server import asked as reading
    from tightfit.runtime.server import own as answering

    loops = []

    def beside(module, name):
        real = getattr(module, name)

        def called(*given):
            loops.append(asyncio._get_running_loop())
            return real(*given)

        monkeypatch.setattr(module, name, called)

    beside(reading, "parsed")
    beside(answering, "told")
    events(own, submitted(own, **HEART))
    assert len(loops) > 1 and not any(loops)


def test_a_client_is_who_is_connected(own, server):
    answer = own.post("jobs", json=LONG, headers={"X-Forwarded-For": "10.0.0.5"})
    assert server.service.ticket(answer.json()["id"]).record.order.client == "127.0.0.1"
    own.delete(f"jobs/{answer.json()['id']}")


def test_plans_leave_threads_to_others_and_are_not_made_for_nobody():
    """One is made, those that may wait do, and the next is refused."""
    from anyio import CapacityLimiter
    from tightfit.runtime.planner.choose import UnwantedError
    from tightfit.runtime.server.failures import RefusedError
    from tightfit.runtime.server.served import MOST_WAITING, attended

    made, begun, go = [], threading.Event(), threading.Event()
    left = set()

    class Client:
        async def is_disconnected(self) -> bool:
            if begun.is_set():  # a slow machine must not find the first gone before its turn
                left.add(self)
            return self in left

    def work(_is_wanted):
        begun.set()
        go.wait(60)
        made.append(1)

    async def all_at_once():
        desk = CapacityLimiter(1)
        asking = [asyncio.ensure_future(attended(Client(), work, desk)) for _ in range(1 + MOST_WAITING)]
        async with asyncio.timeout(60):
            while len(left) <= MOST_WAITING:  # until each is seen to have gone
                await asyncio.sleep(0.01)
        with pytest.raises(RefusedError, match="too many plans") as refused:
            await attended(Client(), work, desk)
        go.set()
        return refused.value.status, await asyncio.gather(*asking, return_exceptions=True)

    status, ends = asyncio.run(all_at_once())
    assert status == 503 and made == [1]
    assert sum(isinstance(end, UnwantedError) for end in ends) == MOST_WAITING


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
def test_what_is_no_json_is_refused(own, content):
    assert own.post("jobs", content=content).status_code == 400


def test_other_kinds_of_bodies_and_places_are_refused(own):
    assert own.post("jobs", content=b"a", headers={"Content-Type": "text/xml"}).status_code == 415
    assert own.get("jobs/../../etc/passwd").status_code == 404
    assert own.get("jobs/nothing/events").status_code == 404
    assert own.get("jobs", params={"limit": 0}).status_code == 422


def test_a_disk_that_is_full_is_no_fault_of_the_client(own, server, monkeypatch):
    from tightfit.runtime.jobs import Jobs, UnkeptError

    def full(*_: object) -> None:
        raise UnkeptError(f"{server.folder} cannot keep jobs: the disk is full: make room")

    monkeypatch.setattr(Jobs, "add", full)
    answer = own.post("jobs", json=HEART)
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert "the disk is full" in answer.json()["error"]["message"]
    monkeypatch.setattr(Jobs, "latest", full)
    answer = own.get("jobs")
    assert answer.status_code == 503 and answer.headers["retry-after"]
