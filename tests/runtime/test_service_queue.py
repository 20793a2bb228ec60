"""What becomes of jobs when something goes wrong: nothing is lost or stuck, and the next one goes on."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tightfit
from PIL import Image
from safetensors.numpy import save_file
from tightfit.runtime import service as module
from tightfit.runtime import upscale
from tightfit.runtime.asking import Shelves, request_of
from tightfit.runtime.budget import DeviceBudget
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.jobs import Jobs, Order, Record, State, UnkeptError
from tightfit.runtime.machine import detect
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.planner.choose import UnwantedError
from tightfit.runtime.run import Run
from tightfit.runtime.service import Limits, QueueFullError, Service, Ticket

ONE_WAY: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "residency": "resident", "attention": "sdpa", "tiling": "whole",
    "cfg": "batched",
}  # fmt: skip
MIB = 2**20
SMALL: dict[str, Any] = {"prompt": "a heart", "width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def service():
    with Service(**ONE_WAY, limits=Limits(waiting=8, pixels=64 * 64, kept=20)) as service:
        yield service


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.05)


def kept(folder: Path, **others) -> Service:
    return Service(**ONE_WAY | others, folder=folder)


def paint(service: Service, seed: int = 1, **others) -> Ticket:
    about = {name: others.pop(name) for name in [*others] if name in Order.__dataclass_fields__}
    return service.submit(about.pop("model", "emoji"), SMALL | {"seed": seed} | others, **about)


def known(service: Service, ticket: Ticket) -> Record:
    record = service.record(ticket.id)
    assert record
    return record


def busy(service: Service) -> Ticket:
    """A job that has begun, and takes longer than any test."""
    ticket = paint(service, num_inference_steps=900)
    next(ticket.events())
    return ticket


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """A step that lasts until this is set."""
    release, predict = threading.Event(), Run._predict

    def slow(*of):
        release.wait(60)
        return predict(*of)

    monkeypatch.setattr(Run, "_predict", slow)
    yield release
    release.set()


# ------------------------------------------------------------------------------------------ ends


@pytest.mark.parametrize("end", [Ticket.cancel, Ticket.stop])
def test_a_job_that_waits_ends_at_once(service, end):
    running, waiting, last = busy(service), paint(service), paint(service)
    end(waiting)
    assert waiting.state is State.CANCELLED  # without waiting for its turn
    assert running.state is State.RUNNING
    assert waiting not in service.active
    with pytest.raises(TightfitError, match="cancelled"):
        waiting.result()
    running.cancel()
    assert last.wait(60) is State.DONE
    assert running.state is State.CANCELLED


@pytest.mark.parametrize("every", [0, 1])
def test_what_is_stopped_before_its_first_picture_has_its_newest_preview(service, every):
    ticket = paint(service, num_inference_steps=900, preview_every=every)
    for event in ticket.events():
        if event.stage == "denoise" and event.step > 1:
            ticket.stop()
            break
    assert ticket.wait(60) is State.STOPPED
    assert [image.size for image in ticket.images] == [(64, 64)] * every
    with pytest.raises(TightfitError, match="read images"):
        ticket.result()


def test_what_is_stopped_keeps_all_that_is_painted():
    """A VAE that takes the U-Net's place decodes all pictures at the end: two are painted, none decoded."""
    with Service(**dict(ONE_WAY, residency="staged")) as service:
        ticket = paint(service, num_images=4)
        for event in ticket.events():
            if event.image == 2:
                ticket.stop()
                break
        assert ticket.wait(60) is State.STOPPED
        pictures = [image.tobytes() for image in ticket.images]
        assert len(pictures) in (2, 3)
        assert (
            pictures == [i.tobytes() for i in paint(service, num_images=4).result().images][: len(pictures)]
        )


def test_the_limit_of_time_holds_while_a_step_lasts(held):
    with Service(**ONE_WAY, limits=Limits(seconds=0.5)) as service:
        late = paint(service)
        assert late.wait(60) is State.FAILED  # though the step goes on
        assert not held.is_set()
        assert late.record.error == "it ran for more than 0.5 seconds, which are allowed here: ask for less"
        events = late.seen(0)
        held.set()
        service.limits = Limits()
        assert paint(service).wait(60) is State.DONE
        assert late.seen(0) == events


def test_a_listener_that_fails_ends_no_job(service):
    ticket, calls = paint(service), []
    ticket.listen(lambda: (calls.append(1), 1 / 0))
    assert ticket.wait(60) is State.DONE
    assert len(calls) == 1


def test_who_has_waited_longest_is_next(service):
    """Three of one client, then one of another, who comes second; and what has priority among its own."""
    running, order = busy(service), []
    about = [
        {"client": "a"},
        {"client": "a"},
        {"client": "a"},
        {"client": "b", "priority": 5},  # which is among b's own
        {"client": "a", "priority": 1},
    ]
    tickets = [paint(service, seed, **one) for seed, one in enumerate(about)]
    for number, ticket in enumerate(tickets):
        ticket.listen(lambda number=number, ticket=ticket: ticket.state.is_end and order.append(number))
    running.cancel()
    for ticket in tickets:
        ticket.result()
    assert order == [4, 3, 0, 1, 2]


# ------------------------------------------------------------------------------------------ what is asked


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ({"model": 3}, "model must be text, not 3"),
        ({"options": [1]}, "options must be values by their names"),
        ({"options": {1: 2}}, "options must be values by their names"),
        ({"client": None}, "client must be text"),
        ({"does": "dance"}, "unknown kind of job 'dance': choose paint, upscale"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"priority": True}, "priority must be a whole number"),
        ({"preview_every": -1}, "preview_every must be a whole number from 0"),
        ({"wishes": {"requests": 1}}, "unknown wish 'requests': choose backend"),
        ({"wishes": {"precision": ["fp32"]}}, r"precision cannot be \['fp32'\]"),
        ({"wishes": {"precision": "fp3"}}, "unknown precision 'fp3'"),
        ({"wishes": {"min_psnr": "x"}}, "min_psnr cannot be 'x'"),
        ({"wishes": {"provider": {}}}, "provider cannot be {}"),
        ({"wishes": {"backend": "onnx"}}, "emoji has no weights that onnx reads: export it with --to onnx"),
        (
            {"wishes": {"precision": "fp16", "attention": "sliced"}},
            "nothing runs emoji as asked: ",
        ),
        ({"options": {"prompt": "a" * 300_000}}, "300.* characters are asked for, and 262144 are taken"),
        ({"note": {"a": "b" * 300_000}}, "characters are asked for"),
        (
            {"options": {"prompt": "a", "width": 8192, "height": 8192}},
            "67108864 pixels are asked for, and 4096",
        ),
        (
            {"options": {"prompt": "a", "image": [Image.new("RGB", (128, 128)), Image.new("L", (1, 1))]}},
            "pictures of 16385 pixels are given, and 16384 are taken",
        ),
        ({"does": "upscale", "options": {}}, "image must be a picture"),
        ({"does": "upscale", "options": {"image": Image.new("RGB", (80, 80))}}, "6400 pixels are asked for"),
        ({"does": "upscale", "options": {"size": 2}}, "unknown option 'size'"),
    ],
)
def test_what_no_queue_takes_is_one_line(service, order, said):
    with pytest.raises(TightfitError, match=said):
        service.queue(Order(**{"model": "emoji", "options": {"prompt": "a"}} | order))
    assert not service.active


@pytest.mark.parametrize("method", ["plans", "planned"])
@pytest.mark.parametrize("more", [{"negative_prompt": "b" * 300_000}, {"image": Image.new("L", (160, 160))}])
def test_a_plan_is_asked_within_the_same_limits(service, monkeypatch, method, more):
    """Before anything is made of it, which may take long."""
    monkeypatch.setattr(module, "request_of", None)
    with pytest.raises(TightfitError, match=r"characters are asked for|pixels are given"):
        getattr(service, method)("emoji", {"prompt": "a", **more})


def test_a_client_has_no_more_memory_than_the_service(monkeypatch):
    monkeypatch.setattr(detect, "resident", lambda: 400 * MIB)  # other tests have let this process grow
    with Service(**ONE_WAY, budget="2GiB") as service:
        with pytest.raises(TightfitError, match=r"budget 3GiB is more than the 2.00 GiB of all models here"):
            paint(service, wishes={"budget": "3GiB"})
        assert paint(service, wishes={"budget": "1.5GiB"}).wait(60) is State.DONE


def test_names_alone_are_taken_where_there_are_shelves(tmp_path, sd1):
    with Service(**ONE_WAY, shelves=Shelves([tmp_path])) as service:
        for model in (str(sd1), "../" + sd1.name, "a\0b", "nothing"):
            with pytest.raises(TightfitError, match="no model"):
                paint(service, model=model)
        with pytest.raises(TightfitError, match="must be a picture itself"):
            service.queue(Order(str(sd1), {"image": "/etc/passwd"}, does="upscale"))


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), np.zeros(3)])
def test_what_is_no_json_is_refused_where_jobs_are_kept(tmp_path, value):
    with kept(tmp_path) as service, pytest.raises(TightfitError, match=r"JSON|neither text"):
        service.queue(Order("emoji", {"prompt": "a"}, note={"a": value}))
    assert not [*(tmp_path / "given").iterdir()]


# ------------------------------------------------------------------------------------------ what is kept


def test_ended_jobs_stay_known_without_a_folder():
    with Service(**ONE_WAY, limits=Limits(kept=2)) as service:
        options = {"image": Image.new("RGB", (64, 64)), "strength": 1.0}
        tickets = [paint(service, seed, **options) for seed in range(3)]
        assert tickets[2].wait(60) is State.DONE
        records = [service.record(ticket.id) for ticket in tickets]
        assert records[0] is None
        assert [record and record.state for record in records[1:]] == [State.DONE] * 2
        assert [record.order.options["seed"] for record in service.jobs.latest()] == [2, 1]
        assert service.jobs.latest(5, before=tickets[2].id) == records[1:2]
        assert not isinstance(service.jobs.latest()[0].order.options["image"], Image.Image)


def full(*_):
    raise UnkeptError("the disk is full: make room")


def test_jobs_wait_while_nothing_can_be_written(tmp_path, monkeypatch):
    """Those that cannot be begun, and those that have ended: what became of them is written after that."""
    with kept(tmp_path) as service:
        blocked, fine, withdrawn = busy(service), paint(service), paint(service)
        with monkeypatch.context() as patch:
            patch.setattr(service.jobs, "change", full)
            blocked.cancel()
            assert blocked.wait(60) is State.CANCELLED
            assert known(service, blocked).state is State.CANCELLED  # though the file says that it runs
            assert fine.wait(0.5) is State.WAITING
            assert service.active == [fine, withdrawn]
            assert service.problem == "the disk is full: make room"
            withdrawn.cancel()
            assert withdrawn.state is State.CANCELLED
        assert fine.wait(60) is State.DONE
        assert (service.problem, fine.record.tries) == ("", 1)
        with monkeypatch.context() as patch:
            patch.setattr(service.jobs, "change", full)
            left = paint(service)
            assert left.wait(0.2) is State.WAITING
            left.cancel()  # which waits for no disk
            assert left.wait(60) is State.CANCELLED
    with closing(Jobs(tmp_path)) as jobs:
        states = [record.state for record in jobs.latest()]
        assert states == [State.CANCELLED, State.CANCELLED, State.DONE, State.CANCELLED]


@pytest.mark.parametrize("is_late", [False, True])
def test_a_picture_that_cannot_be_written_waits_for_room(tmp_path, monkeypatch, is_late):
    """Until its job's time is over."""
    with kept(tmp_path) as service:
        tried = threading.Event()
        with monkeypatch.context() as patch:
            patch.setattr(module, "save", lambda *_: (tried.set(), full()))
            ticket = paint(service)
            assert tried.wait(60)
            assert ticket.wait(0.2) is State.RUNNING
            if is_late:
                service._late(ticket)  # as its timer does
                assert ticket.record.error.endswith("are allowed here: the disk is full: make room")
                return
        assert ticket.wait(60) is State.DONE
        (file,) = known(service, ticket).pictures
        with Image.open(file) as picture:
            assert picture.tobytes() == ticket.images[0].tobytes()


def test_a_job_that_ends_while_its_picture_is_saved_leaves_no_file(tmp_path, monkeypatch):
    saved, release, real = threading.Event(), threading.Event(), module.save

    def slow(*of):
        real(*of)
        saved.set()
        assert release.wait(60)

    with kept(tmp_path) as service:
        monkeypatch.setattr(module, "save", slow)
        ticket = paint(service)
        assert saved.wait(60)
        service._late(ticket)  # as its timer does
        assert ticket.state is State.FAILED
        release.set()
        service.close()
        assert ticket.record.pictures == ()
        assert not [*service.jobs.pictures.iterdir()]


@pytest.mark.parametrize("slow", ["change", "forget", "free"])
def test_what_there_is_is_told_while_a_file_is_written(tmp_path, monkeypatch, slow):
    """A door's loop asks; a disk may take seconds, and so may what a model holds."""
    begun, release = threading.Event(), threading.Event()

    def waits(*_):
        begun.set()
        assert release.wait(60)

    with kept(tmp_path) as service:
        running = busy(service)
        waiting = paint(service)
        with monkeypatch.context() as patch:
            patch.setattr(service.models if slow == "free" else service.jobs, slow, waits)
            service.unload()
            running.cancel()
            assert begun.wait(60)
            asked = threading.Thread(
                target=lambda: (service.active, service.running, service.ticket("a"), service.unload()),
                daemon=True,
            )
            asked.start()
            asked.join(10)
            release.set()
            assert not asked.is_alive()
        assert waiting.wait(60) is State.DONE


def test_pictures_wait_as_files(tmp_path):
    """Not in memory, before a restart and after. Painted is the same, also of a photo on its side."""
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    image.getexif()[274] = 6
    options = {"image": image, "mask_image": Image.new("L", (48, 64), 255), "strength": 1.0}
    with Service(**ONE_WAY) as service:
        alone = paint(service, **options).result().images[0]
    with kept(tmp_path) as service:
        waiting = [busy(service), paint(service, **options)][1]
        assert (waiting.request, waiting.record.order.pixels) == (None, 0)
    assert waiting.state is State.POSTPONED
    with pytest.raises(QueueFullError, match="after its next start"):
        waiting.result()
    with kept(tmp_path) as service:
        first, waiting = service.active
        assert (waiting.request, waiting.record.order.pixels) == (None, 0)
        first.cancel()
        assert waiting.result().images[0].tobytes() == alone.tobytes()


def test_a_queue_that_cannot_be_written_is_full(tmp_path, monkeypatch):
    with kept(tmp_path) as service:
        monkeypatch.setattr(Order, "written", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(QueueFullError, match="No space left"):
            paint(service)
        assert not service.active


def test_what_a_kill_leaves_half_written_is_removed(tmp_path):
    """A job's pictures without the job, and one that was begun. What is somebody else's stays."""
    kept(tmp_path).close()
    orphan, theirs = tmp_path / "given" / ("a" * 32), tmp_path / "given" / "theirs"
    for folder in (orphan, theirs):
        folder.mkdir()
        (folder / "0.png").write_bytes(b"half")
    pictures = tmp_path / "pictures"
    names = {f"{'b' * 32}-1.png": False, ".tightfit-0.partial": False, "holiday.png": True, "notes.txt": True}
    for name in names:
        (pictures / name).write_bytes(b"half")
    kept(tmp_path).close()
    assert {name: (pictures / name).exists() for name in names} == names
    assert (orphan.exists(), (theirs / "0.png").exists()) == (False, True)


def test_one_job_that_cannot_be_read_again_is_no_reason_to_lose_the_others(tmp_path):
    with kept(tmp_path) as service:
        running = busy(service)
        image = {"image": Image.new("RGB", (64, 64)), "strength": 1.0}
        without, other, _ = paint(service, **image), paint(service), paint(service, **image)
        running.cancel()
        service.close()
    (tmp_path / "given" / without.id / "0.png").write_bytes(b"no picture")
    with closing(sqlite3.connect(tmp_path / "jobs.db")) as file, file:
        asked = json.dumps({"model": "emoji", "options": {}, "of_another_version": 1})
        file.execute("update jobs set asked = ? where id = ?", (asked, other.id))
    with kept(tmp_path) as service:
        assert known(service, without).state is State.FAILED
        assert "cannot be read again" in known(service, without).error
        assert known(service, other).state is State.FAILED
        assert service.active[0].wait(60) is State.DONE


def test_closing_is_no_try(tmp_path, monkeypatch):
    """A job that is begun again after each of many restarts is done in the end, with its seed and subseed."""
    monkeypatch.setattr(module, "TRIES", 1)
    options = {"seed": -1, "subseed_strength": 0.5, "num_inference_steps": 20}
    for _ in range(2):
        with kept(tmp_path) as service:
            ticket = service.active[0] if service.active else paint(service, **options)
            next(ticket.events())
        with pytest.raises(TightfitError, match="after its next start"):
            ticket.result()
    with kept(tmp_path) as service:
        assert service.active[0].wait(60) is State.DONE
        record = service.jobs.latest()[0]
        assert record.tries == 1
        (file,) = record.pictures
        again = paint(service, **record.order.options)
        with Image.open(file) as picture:
            assert picture.tobytes() == again.result().images[0].tobytes()


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory) -> Path:
    """Random weights that double a picture."""
    file, convolutions = tmp_path_factory.mktemp("upscalers") / "double.safetensors", (3, 4, 4, 12)
    random, weights = np.random.default_rng(0), {}
    for number, (channels, features) in enumerate(itertools.pairwise(convolutions)):
        values = random.standard_normal((features, channels, 3, 3)).astype(np.float32)
        weights |= {f"body.{2 * number}.weight": values, f"body.{2 * number}.bias": values[:, 0, 0, 0]}
        weights |= {f"body.{2 * number + 1}.weight": values[:, 0, 0, 0]}
    save_file({name: weights[name] for name in [*weights][:-1]}, file)
    return file


def test_pictures_are_enlarged_in_their_turn_within_the_limits(tmp_path, upscaler):
    image = Image.effect_noise((24, 16), 80).convert("RGB")
    image.info["parameters"] = "a heart"
    with kept(tmp_path, limits=Limits(pixels=24 * 16 * 16)) as service:
        order = Order(str(upscaler), {"image": image}, does="upscale")
        done, twice = (
            service.queue(order),
            service.queue(replace(order, options={"image": image, "scale": 4})),
        )
        large = service.queue(replace(order, options={"image": image, "scale": 5}))
        assert [ticket.wait(60) for ticket in (done, twice, large)] == [State.DONE] * 2 + [State.FAILED]
        assert "24576 pixels are asked for, and 6144 are taken here" in large.record.error
        assert twice.images[0].size == (96, 64)
        alone = tightfit.upscale(image, upscaler, device="cpu", precision="fp32")
        assert done.images[0].tobytes() == alone.tobytes()
        (file,) = known(service, done).pictures
        with Image.open(file) as picture:
            assert picture.info["parameters"].startswith("a heart")


def test_what_is_enlarged_in_two_passes_is_cancelled_between_them(upscaler, monkeypatch):
    with Service(**ONE_WAY) as service:
        begun, enlarged = [], upscale.enlarged

        def cancelled(*of):
            begun.append(1)
            tickets[0].cancel()
            return enlarged(*of)

        monkeypatch.setattr(upscale, "enlarged", cancelled)
        running = busy(service)
        options = {"image": Image.new("RGB", (8, 8)), "scale": 4}
        tickets = [service.queue(Order(str(upscaler), options, does="upscale"))]
        running.cancel()
        assert tickets[0].wait(60) is State.CANCELLED
        assert (len(begun), tickets[0].images) == (1, [])


def test_a_job_that_ends_its_process_is_given_up(tmp_path):
    with kept(tmp_path) as service:
        ticket = busy(service)
    with closing(Jobs(tmp_path)) as jobs:
        jobs.change(replace(ticket.record, state=State.RUNNING, tries=module.TRIES))
    with kept(tmp_path) as service:
        record = known(service, ticket)
        assert record.state is State.FAILED
        assert "tightfit ended 3 times while it ran" in record.error


def test_a_second_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sqlite3, "connect", lambda *of, connect=sqlite3.connect, **o: connect(*of, **o | {"timeout": 0})
    )
    with kept(tmp_path), pytest.raises(TightfitError, match="another tightfit serves from it"):
        kept(tmp_path)
    kept(tmp_path).close()


# ------------------------------------------------------------------------------------------ models


def test_a_model_that_changes_is_read_again(sd1_copy):
    with Service(**ONE_WAY) as service:
        before = paint(service, model=str(sd1_copy)).result().images[0]
        weights = sd1_copy / "unet" / "diffusion_pytorch_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-(2**14) :] = bytes(2**14)  # the last tensors, of the same size
        weights.write_bytes(content)
        after = paint(service, model=str(sd1_copy)).result().images[0]
        with tightfit.load(str(sd1_copy), **ONE_WAY) as fresh:
            alone = fresh.generate(request_of(SMALL | {"seed": 1})).images[0]
        assert after.tobytes() == alone.tobytes() != before.tobytes()
        weights.unlink()
        gone = paint(service, model=str(sd1_copy))
        assert gone.wait(60) is State.FAILED
        assert str(sd1_copy) in gone.record.error
        assert not service.loaded()  # what was open of it is freed


TINY = {"width": 64, "height": 64, "num_inference_steps": 1}


@pytest.mark.parametrize("is_roomy", [True, False])
def test_two_models_stay_loaded_where_both_fit(tiny_models, monkeypatch, is_roomy):
    """The pictures, and what is predicted, are those of each alone."""
    machine = Hardware.detect("cpu")  # once, as the process takes another amount each time
    monkeypatch.setattr(Hardware, "detect", lambda _: machine)
    monkeypatch.setattr(DeviceBudget, "_devices", {})  # other tests' services have more room
    names = [str(tiny_models[family]) for family in ("sd1", "sdxl", "sd1")]
    with Service(**ONE_WAY) as service:
        plans = [service.plans(name, SMALL | TINY)[0] for name in names[:2]]
    first, second = (plan.predicted for plan in plans)
    loaded_bytes = min(first.stages.values())  # less than what the first leaves loaded
    room_bytes = max(first.peak_bytes, second.peak_bytes) + (2 * first.peak_bytes if is_roomy else 0)
    assert is_roomy or second.peak_bytes + loaded_bytes > room_bytes
    with Service(**ONE_WAY, budget=room_bytes + first.context_bytes + MIB) as service:
        tickets = [paint(service, model=name, **TINY) for name in names]
        results = [ticket.result() for ticket in tickets]
        held_bytes = service.loaded()
    assert all(held_bytes.values()) == is_roomy
    assert sum(held_bytes.values()) < room_bytes + MIB
    said = [[notice for notice in ticket.notices if "make room" in notice] for ticket in tickets]
    freed = [[], [f"{names[0]} was freed to make room"], [f"{names[1]} was freed to make room"]]
    assert said == ([[], [], []] if is_roomy else freed)
    assert [known(service, ticket).summary["notices"] for ticket in tickets] == [t.notices for t in tickets]
    for result, plan in zip(results, (*plans, plans[0]), strict=True):
        assert result.plan.placements == plan.placements
        assert result.peak_bytes == pytest.approx(result.predicted_bytes, rel=0.05)
    with tightfit.load(names[1], **ONE_WAY) as pipeline:
        alone = pipeline.generate(request_of(SMALL | TINY | {"seed": 1}))
    assert results[1].images[0].tobytes() == alone.images[0].tobytes()
    assert results[0].images[0].tobytes() == results[2].images[0].tobytes()


def test_what_nobody_waits_for_is_planned_no_further(service):
    """A page asks anew at each move of a slider: what was asked before is given up between two ways."""
    asked, planned = [], service.models.planning("emoji", service.models.wished({}))

    def is_wanted() -> bool:
        asked.append(1)
        return len(asked) < 2

    wishes = {"precision": "fp32", "residency": "auto", "cfg": "auto"}
    sizes = SMALL | {"width": 32}
    with pytest.raises(UnwantedError):
        service.planned("emoji", sizes, None, is_wanted, **wishes)
    assert len(asked) == 2
    assert len(service.plans("emoji", sizes, **wishes)) > 2
    assert service.models.planning("emoji", service.models.wished({})) is planned
