"""A machine that is told what to paint as plain data, and asked: here, and by Ray."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tightfit.__main__ import app
from tightfit.runtime.batch import painting
from tightfit.runtime.batch.ledger import Item
from tightfit.runtime.batch.painting import Encoded, Encoding, Failed, Predicted, Took
from tightfit.runtime.batch.staging import parcel, parts
from tightfit.runtime.batch.worker import Setup, Worker, versions
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.models.hub import BUILT_IN
from typer.testing import CliRunner

WISHES = {"precision": "fp32", "residency": "resident", "attention": "sdpa", "tiling": "whole"}
OPTIONS = {"prompt": "a red heart", "width": 64, "height": 64, "num_inference_steps": 2}


def items(count: int, model: str = "emoji", **more: Any) -> list[Item]:
    return [
        Item(number, number, 1, model, WISHES, {**OPTIONS, "seed": number, **more}, "")
        for number in range(1, count + 1)
    ]


def worker(folder: Path, own: str = "", **setup: Any) -> Worker:
    """As it comes over a wire."""
    given = Setup(Encoding("x"), str(folder), device="cpu", **setup)
    return Worker(pickle.loads(pickle.dumps(given)), own)


def told(painter: Worker) -> list[Any]:
    """All news of a run, as they come over a wire."""
    every, is_over, end = [], False, time.monotonic() + 60
    while not is_over and time.monotonic() < end:
        news, is_over = pickle.loads(pickle.dumps(painter.news()))
        every += news
    return every


def test_a_machine_paints_within_its_own_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(Path.cwd())  # which it leaves
    painter = worker(tmp_path, "2GiB", budget="4GiB")
    about = painter.about()
    assert Path.cwd() == tmp_path
    assert (about.budget_bytes, about.versions) == (2 * 2**30, versions())
    assert worker(tmp_path, "4GiB", budget="2GiB").about().budget_bytes == 2 * 2**30
    with pytest.raises(TightfitError, match="budget"):
        worker(tmp_path, "much").about()
    known = pickle.loads(pickle.dumps(painter.predicted(items(1)[0], 8)))
    assert isinstance(known, Predicted) and known.together > 1
    assert known.plan.budget_bytes == 2 * 2**30
    assert "nowhere does not exist" in painter.predicted(items(1, "nowhere")[0], 8)
    counter = SimpleNamespace(joules=lambda: 12.0)
    monkeypatch.setattr(painting, "Energy", lambda device: counter if device == "cpu" else None)
    painter.paint([*items(3), *items(1, width=60)])
    news = told(painter)
    made = {one.item.number: one for one in news if isinstance(one, Encoded)}
    assert sorted(made) == [1, 2, 3]
    assert all(one.content.startswith(b"\x89PNG") and "Seed: " in one.parameters for one in made.values())
    assert [one.measures.joules for one in news if isinstance(one, Took)] == [4.0]
    assert "width 60" in next(one.error for one in news if isinstance(one, Failed))


def test_the_pixels_of_a_picture_are_of_its_last_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    here = worker(tmp_path).here
    assert here.pixels(items(1)[0]) == 64 * 64
    assert here.pixels(items(1, hires=2.0)[0]) == 128 * 128


def test_strangers_name_models_and_open_no_path(tmp_path, monkeypatch):
    """As `tightfit serve --ray` has it; of a batch each row is the person's own."""
    monkeypatch.chdir(Path.cwd())
    place = str(BUILT_IN["emoji"])
    painter = worker(tmp_path, named=(("mine", place),))
    assert painter.here.pixels(items(1, "mine")[0]) == 64 * 64
    for asked in (items(1, place)[0], items(1, "mine", image=f"{place}/../emoji.png")[0]):
        assert isinstance(painter.predicted(asked, 1), str)
    assert "must be a picture itself" in f"{painter.predicted(asked, 1)}"
    assert worker(tmp_path).here.pixels(items(1, place)[0]) == 64 * 64


def test_what_is_stopped_gives_back_what_it_has_not_painted(tmp_path, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    painter = worker(tmp_path)
    painter.paint(items(2, num_inference_steps=500))
    painter.news()
    painter.stop()
    assert not [one for one in told(painter) if isinstance(one, Encoded | Failed)]
    painter.paint(items(1))
    assert [one for one in told(painter) if isinstance(one, Encoded)]


def test_a_model_that_was_sent_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    packed = parcel(str(BUILT_IN["emoji"]))
    assert packed
    painter = worker(tmp_path, staged=(("/not/here/emoji", packed.digest),))
    assert painter.about().missing == (packed.digest,)
    for name, file in packed.files.items():
        for part in parts(file):
            painter.add(packed.digest, name, part)
    painter.finish(packed.digest)
    assert not painter.about().missing
    painter.paint(items(1, "/not/here/emoji"))
    (sent,) = [one for one in told(painter) if isinstance(one, Encoded)]
    painter.paint(items(1))
    (here,) = [one for one in told(painter) if isinstance(one, Encoded)]
    assert hashlib.sha256(_pixels(sent)).digest() == hashlib.sha256(_pixels(here)).digest()


def _pixels(encoded: Encoded) -> bytes:
    from io import BytesIO

    from PIL import Image

    return Image.open(BytesIO(encoded.content)).convert("RGB").tobytes()


def test_what_is_asked_of_a_cluster_is_checked(tmp_path):
    """By the command line, before any work."""
    (tmp_path / "t.txt").write_text("a red heart")
    for more, said in (
        (["--stage-models"], "say which, by --ray auto"),
        (["--ray", "local"], "is no address"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1 (Connection refused)"),
        (["--ray", "127.0.0.1:99999"], "no Ray cluster answers"),
        (["--ray", "10.0.0.1"], "is no address"),
        (["--ray", "ray://10.0.0.1:10001"], "is no address"),
        (["-o", "s3://bucket/x"], "and the address by --upload"),
        (["--upload", "bucket/x"], "is no address"),
        (["--upload", "no-such-protocol://x"], "no-such-protocol"),
    ):
        result = CliRunner().invoke(app(), ["batch", str(tmp_path / "t.txt"), "-o", str(tmp_path), *more])
        assert isinstance(result.exception, TightfitError) and said in str(result.exception)


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    whole = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield whole
    finally:
        whole.shutdown()


def begun(cluster: Any, budget: str) -> Any:
    """A node that may take so much."""
    labels = {"tightfit-budget": budget}
    return cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, labels=labels)


@pytest.mark.slow
def test_a_cluster_serves(tmp_path, cluster):
    """By one address: each job where it fits, and what a lost node had elsewhere."""
    httpx = pytest.importorskip("httpx")
    begun(cluster, "670MiB")
    large = begun(cluster, "2GiB")
    wished = [word for name, value in WISHES.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "tightfit", "serve", "--ray", cluster.address, "--port", "0"]
    state = ["--state", str(tmp_path), "--device", "cpu", "--no-ui"]
    with subprocess.Popen([*command, *state, *wished], stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout
            address = serving.stdout.readline().split(" at ")[1].split()[0]

            def submitted(**more: Any) -> str:
                told = httpx.post(f"{address}/v1/tightfit/jobs", json=OPTIONS | more)
                assert told.status_code == 202, told.text
                return told.json()["id"]

            def ended(name: str) -> dict[str, Any]:
                end = time.monotonic() + 60
                while True:
                    told = httpx.get(f"{address}/v1/tightfit/jobs/{name}").json()
                    if told["state"] not in ("waiting", "running"):
                        return told
                    assert time.monotonic() < end, told
                    time.sleep(0.05)

            wide = ended(submitted(width=384, height=384))
            assert wide["state"] == "done", wide
            (roomy,) = wide["summary"]["machines"]
            both = [ended(name) for name in [submitted(num_images=2, num_inference_steps=30) for _ in "ab"]]
            assert {one["summary"]["machines"][0] for one in both} > {roomy}
            png = httpx.get(address + both[0]["pictures"][1])
            assert png.content.startswith(b"\x89PNG")
            jobs = [submitted(num_inference_steps=300) for _ in "ab"]
            while len(httpx.get(f"{address}/v1/tightfit/jobs/{jobs[1]}").json()["plan"] or ()) == 0:
                time.sleep(0.05)
            cluster.remove_node(large, allow_graceful=False)
            every = [ended(name) for name in jobs]
            assert [one["state"] for one in every] == ["done", "done"]
            assert sorted(one["tries"] for one in every) == [1, 2]
            refused = ended(submitted(width=384, height=384))
            assert refused["state"] == "failed" and "runs on no machine" in refused["error"]
        finally:
            serving.terminate()
            serving.wait(60)


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_gets_another(tmp_path, cluster):
    begun(cluster, "2GiB")
    lost = begun(cluster, "1500MiB")
    row = {**OPTIONS, "seed": "1..200", "num_inference_steps": 8}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    command = [
        sys.executable,
        "-m",
        "tightfit",
        "batch",
        str(tmp_path / "t.jsonl"),
        "-o",
        str(tmp_path / "d"),
    ]
    wished = [word for name, value in WISHES.items() for word in (f"--{name}", value)]
    with subprocess.Popen(
        [*command, "--ray", cluster.address, "--json", "--device", "cpu", *wished],
        stdout=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        while running.poll() is None and len([*(tmp_path / "d").glob("*.png")]) < 40:
            time.sleep(0.1)
        begun(cluster, "1GiB")
        cluster.remove_node(lost, allow_graceful=False)
        report = json.loads(running.communicate(timeout=200)[0])
    assert (report["done"], report["painted"]) == (200, 200)
    assert len([*(tmp_path / "d").glob("*.png")]) == 200
    assert len(report["nodes"]) == 3 and all(node["painted"] for node in report["nodes"])
    assert sum(node["lost"] for node in report["nodes"]) == 1
