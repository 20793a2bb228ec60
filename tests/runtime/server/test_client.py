"""`tightfit.connect` beside `tightfit.load`: the same calls, the same pixels, the same errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tightfit
from PIL import Image
from tightfit.runtime.models.hub import BESIDE

SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def pipes(server):
    with (
        tightfit.load("emoji", device="cpu", precision="fp32", residency="resident") as local,
        tightfit.connect(server.url) as remote,
    ):
        yield local, remote


def ramp(channels: int = 3) -> np.ndarray:
    return np.arange(64 * 64 * channels, dtype=np.uint8).reshape(64, 64, channels)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_images": 2, "scheduler": "Euler a", "lora": "flat:0.5"},
        {"image": ramp(), "strength": 0.6},
        {"image": ramp(4), "mask_content": "fill"},
        {"control_image": ramp(), "controlnet_conditioning_scale": 0.8},
    ],
)
def test_the_same_call_paints_the_same_pixels(pipes, options):
    here, there = (pipe("a red heart", seed=7, **SMALL, **options) for pipe in pipes)
    many = lambda painted: painted if isinstance(painted, list) else [painted]  # noqa: E731
    assert [one.tobytes() for one in many(here)] == [one.convert("RGB").tobytes() for one in many(there)]
    here, there = ([one.info["parameters"] for one in many(painted)] for painted in (here, there))
    assert [text.replace(str(BESIDE["flat"]), "flat") for text in here] == there  # a client is told no path


def test_pictures_of_files_are_sent(pipes, tmp_path):
    file = tmp_path / "a.png"
    pipes[0]("a pizza", seed=1, **SMALL).save(file)
    here, there = (pipe("a red heart", seed=7, image=str(file), **SMALL) for pipe in pipes)
    assert here.tobytes() == there.convert("RGB").tobytes()


def test_plans_and_models(pipes):
    local, remote = pipes
    plans = local.plans(tightfit.Request("a", width=64, height=64))
    told = remote.plans("a", width=64, height=64)
    assert [plan.placements for plan in told] == [plan.placements for plan in plans]
    assert [plan.predicted.stages for plan in told] == [plan.predicted.stages for plan in plans]
    assert remote.plans(hardware="rtx-2060")[0].device == "cuda"
    with pytest.raises(tightfit.TightfitError, match="does not fit"):
        remote.plans(hardware="rtx-2060", budget="290MiB", width=512, height=512)
    assert {"emoji", "flat"} <= {model["name"] for model in remote.models()}


def test_events_come_while_it_paints_and_closing_them_cancels(pipes, server):
    _, remote = pipes
    options = {"num_inference_steps": 12, "width": 64, "height": 64}
    events = list(remote.run("a red heart", preview_every=4, **options))
    assert events[-1].stage == "done" and any(event.preview for event in events)
    assert [event.step for event in events if event.stage == "denoise"][-1] == 12
    running = remote.run("a red heart", **options | {"num_inference_steps": 900})
    next(running)
    running.close()
    job = remote._asked("GET", "jobs", params={"limit": 1})["jobs"][0]
    service = server.service
    assert (ticket := service.ticket(job["id"])) is None or ticket.wait(60).value == "cancelled"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 63}, "not a multiple"),
        ({"model": "nothing"}, "is called 'nothing'"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"adapters": [object()]}, "cannot be sent"),
        ({"image": "/no/such/file.png"}, "cannot be read"),
    ],
)
def test_errors_are_the_servers_own_words(pipes, options, said):
    with pytest.raises(tightfit.TightfitError, match=said):
        pipes[1]("a", **options)


def test_nothing_that_answers_is_said_in_one_line(serving, tmp_path):
    from tightfit.runtime.server.guard import Door

    with serving(tmp_path, Door(api_key="sesame")) as closed:
        with pytest.raises(tightfit.TightfitError, match="key is missing or wrong"):
            tightfit.connect(closed.url, "wrong")
        bare = closed.url.removeprefix("http://")
        assert tightfit.connect(bare, "sesame").info()["model"] == "emoji"
    for url in (closed.url, "nowhere", "http://["):
        with pytest.raises(tightfit.TightfitError, match=r"does not answer|no address"):
            tightfit.connect(url)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; answers (exit code, standard output, standard error)."""
    from tightfit.runtime.cli.app import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str):
        monkeypatch.setattr("sys.argv", ["tightfit", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, *capsys.readouterr()

    return run


AT_64 = ("--steps", "2", "--width", "64", "--height", "64", "--seed", "7")


def test_the_command_paints_there(pipes, call, server, tmp_path):
    """And saves what the server sends, in files named as those that are painted here."""
    code, out, err = call(
        "a red heart", "--connect", server.url, *AT_64, "--num-images", "2", "--lora", "flat:0.5"
    )
    assert (code, err) == (0, "")
    assert f"at {server.url}" in out
    here = pipes[0]("a red heart", seed=7, num_images=2, lora="flat:0.5", **SMALL)
    files = sorted(tmp_path.glob("*.png"))
    assert [Image.open(file).convert("RGB").tobytes() for file in files] == [one.tobytes() for one in here]
    assert [Image.open(file).info["parameters"] for file in files] == [
        one.info["parameters"].replace(str(BESIDE["flat"]), "flat") for one in here
    ]


def test_a_picture_is_sent_by_the_command(pipes, call, server, tmp_path):
    pipes[0]("a pizza", seed=1, **SMALL).save(tmp_path / "a.png")
    code, out, _ = call("a red heart", "--connect", server.url, *AT_64, "--image", "a.png", "--json")
    assert code == 0
    here = pipes[0]("a red heart", seed=7, image=str(tmp_path / "a.png"), **SMALL)
    assert Image.open(json.loads(out)["image"]).convert("RGB").tobytes() == here.tobytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--plan", "plan.json"), "--plan is of this machine"),
        (("--device", "cpu"), "--device is of this machine"),
        (("--model", "nosuch"), "nosuch"),
        (("--num-images", "0"), "--num-images must"),
    ],
)
def test_what_cannot_be_painted_there_is_one_line(call, server, options, said):
    code, out, err = call("a red heart", "--connect", server.url, *AT_64, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_nothing_answers(call):
    code, _, err = call("a red heart", "--connect", "http://127.0.0.1:9")
    assert code == 2 and "start tightfit serve there" in err
