"""A service whose jobs several machines paint: who gets which, what is lost, and how jobs end."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from tightfit.runtime.asking import request_of
from tightfit.runtime.batch.ledger import Item, Measures
from tightfit.runtime.batch.painting import Encoded, Failed, Predicted, Stepped, Took
from tightfit.runtime.batch.serving import Spreading, foremost
from tightfit.runtime.batch.spread import Foreseen, Joined, Lost, Told
from tightfit.runtime.batch.worker import About, versions
from tightfit.runtime.conditions.image import ImageToImage
from tightfit.runtime.conditions.input_pictures import open_picture
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.events import Event
from tightfit.runtime.jobs import State
from tightfit.runtime.machine.hardware import Hardware
from tightfit.runtime.request import Request
from tightfit.runtime.service import TRIES

SMALL = {"prompt": "a heart", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
LARGE = SMALL | {"width": 512}


def png(item: Item) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", f"Seed: {item.options['seed']}")
    stream = BytesIO()
    Image.new("RGB", (8, 8), (item.options["seed"], 0, 0)).save(stream, "PNG", pnginfo=text)
    return stream.getvalue()


@dataclass
class Crew:
    """Machines by their seconds of a picture, and the widest that fits each. They paint when they are told
    to."""

    machines: dict[str, tuple[float, int]]
    is_growing: bool = False
    note: Any = None
    given: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    stopped: list[str] = field(default_factory=list)
    happens: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)

    def __post_init__(self):
        for name in self.machines:
            self.happens.put(Joined(name, "a machine"))

    def wait(self):
        try:
            return [self.happens.get(timeout=0.01)]
        except queue.Empty:
            return []

    def predict(self, node, item, count):
        seconds, most = self.machines[node]
        fits = item.options["width"] <= most
        known = Predicted(None, seconds, count) if fits else f"{node} is too small"  # type: ignore
        self.happens.put(Foreseen(node, item.group, known))

    def paint(self, node, items):
        self.given.put((node, [*items]))

    def stop(self, node):
        self.stopped.append(node)
        self.happens.put(Told(node, [], True))

    def taken(self) -> tuple[str, list[Item]]:
        return self.given.get(timeout=20)

    def tell(self, node, *news, is_over=False):
        self.happens.put(Told(node, [*news], is_over))

    def done(self, node, items):
        took = Took(tuple(items), Measures(2.0, 2.0, 7, "a plan"))
        self.tell(node, *(Encoded(item, png(item), "") for item in items), took, is_over=True)


@pytest.fixture
def served():
    """Makes a service of machines."""
    services = []

    def made(folder=None, **machines: tuple[float, int]):
        crew = Crew(machines)
        services.append(Spreading(crew, device="cpu", folder=folder))
        return services[-1], crew

    yield made
    for service in services:
        service.close()


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def test_a_job_goes_to_the_soonest_that_it_fits(served, tmp_path):
    service, crew = served(tmp_path, slow=(9.0, 512), fast=(1.0, 64))
    first = service.submit("emoji", SMALL | {"num_images": 3})
    node, items = crew.taken()
    assert node == "fast" and [item.options["seed"] for item in items] == [5, 6, 7]
    large = service.submit("emoji", LARGE)
    assert crew.taken()[0] == "slow"
    waits = service.submit("emoji", LARGE)
    assert service.at_work == [first, large] and service.active == [first, large, waits]
    crew.tell("fast", Stepped(items[1], Event("denoise", 3, 6, image=1, notices=("a notice",))))
    until(lambda: first.done == 0.5)
    crew.done("fast", items)
    assert first.wait(20) is State.DONE
    assert [image.info["parameters"] for image in first.images] == ["Seed: 5", "Seed: 6", "Seed: 7"]
    record = service.record(first.id)
    assert [Image.open(file).getpixel((0, 0))[0] for file in record.pictures] == [5, 6, 7]
    assert record.summary["machines"] == ["fast"] and record.summary["seconds"] == 6.0
    assert first.notices == ["a notice"]
    with pytest.raises(queue.Empty):  # "fast" is idle, and too small
        crew.given.get(timeout=0.1)
    assert waits.state is State.WAITING


def test_a_request_of_python_is_painted_as_it_was_asked(served):
    service, crew = served(a=(1.0, 64))
    asked = Request("a heart", "blue", width=64, height=64, num_inference_steps=2, seed=5, num_images=2)
    ticket = service.submit("emoji", asked)
    node, items = crew.taken()
    assert [request_of(item.options) for item in items] == [
        replace(asked, num_images=1, seed=s) for s in (5, 6)
    ]
    crew.done(node, items)
    assert ticket.wait(20) is State.DONE
    over = ImageToImage(open_picture(Image.new("RGB", (64, 64))), 0.5)
    with pytest.raises(TightfitError, match="others paint: submit options by their names"):
        service.submit("emoji", replace(asked, conditions=(over,)))


def test_the_foremost_machine_is_the_soonest_then_the_roomiest():
    def about(device, seconds, gigabytes):
        hardware = Hardware(device, f"{device} {seconds}", 2**40, 2**40, ("fp32",))
        return About(versions(), hardware.name, gigabytes * 2**30, (), hardware)

    def seconds(machine):
        return float(machine.name.split()[1])

    processor, card, roomier = about("cpu", 30.0, 64), about("cuda", 2.0, 8), about("cuda", 2.00, 24)
    assert foremost([processor], seconds).free_bytes == 64 * 2**30
    assert foremost([processor, card], seconds).device == "cuda"
    assert foremost([processor, card, roomier], seconds).free_bytes == 24 * 2**30
    assert foremost([processor, card, roomier], lambda _: float("inf")).free_bytes == 24 * 2**30


def test_what_fits_no_machine_fails_and_says_why(served):
    service, crew = served(a=(1.0, 64), b=(1.0, 128))
    with pytest.raises(TightfitError, match="runs on no machine: a is too small; b is too small"):
        service.submit("emoji", LARGE).result()
    ticket = service.submit("emoji", SMALL)
    node, items = crew.taken()
    crew.tell(node, Failed(items[0], "poison"), is_over=True)
    with pytest.raises(TightfitError, match="poison"):
        ticket.result()


def test_each_machine_says_itself_what_it_cannot_do(served):
    """Here is a CPU, for which 16 bits by half are nothing; and one job's error is no other's."""
    service, crew = served(a=(1.0, 64))
    ticket = service.submit("emoji", SMALL, wishes={"compute": "fp16"})
    node, items = crew.taken()
    crew.tell(node, Encoded(items[0], b"no picture", ""), is_over=True)
    with pytest.raises(OSError, match="cannot identify"):
        ticket.result()
    ticket = service.submit("emoji", SMALL)
    crew.done(*crew.taken())
    assert ticket.wait(20) is State.DONE


def test_another_machine_paints_what_is_left_of_a_lost_one(served, tmp_path):
    service, crew = served(tmp_path, a=(1.0, 64), b=(2.0, 64))
    ticket = service.submit("emoji", SMALL | {"num_images": 2})
    node, items = crew.taken()
    assert node == "a"
    crew.tell("a", Encoded(items[0], png(items[0]), ""))
    crew.happens.put(Lost("a", ""))
    node, rest = crew.taken()
    assert node == "b" and rest == items[1:]
    crew.done("b", rest)
    assert ticket.wait(20) is State.DONE and len(ticket.images) == 2
    record = service.record(ticket.id)
    assert (record.tries, len(record.pictures), record.summary["machines"]) == (2, 2, ["a", "b"])


def test_a_job_that_ends_machines_fails(served):
    service, crew = served(a=(1.0, 64))
    ticket = service.submit("emoji", SMALL)
    for _ in range(TRIES):
        crew.taken()
        crew.happens.put(Lost("a", ""))
        crew.happens.put(Joined("a", "a machine"))
    with pytest.raises(TightfitError, match=f"was lost, {TRIES} times"):
        ticket.result()


def test_a_job_is_cancelled_or_stopped_where_it_runs(served):
    service, crew = served(a=(1.0, 64))
    ticket = service.submit("emoji", SMALL | {"num_images": 2})
    _, items = crew.taken()
    ticket.cancel()
    assert ticket.wait(20) is State.CANCELLED
    crew.tell("a", Encoded(items[0], png(items[0]), ""))  # comes late, and is nobody's
    ticket = service.submit("emoji", SMALL | {"num_images": 2})
    _, items = crew.taken()
    assert crew.stopped == ["a"]
    crew.tell("a", Encoded(items[0], png(items[0]), ""))
    until(lambda: ticket.images)
    ticket.stop()
    assert ticket.wait(20) is State.STOPPED and len(ticket.images) == 1


def test_jobs_wait_in_the_folder_for_the_next_start(served, tmp_path):
    service, crew = served(tmp_path, a=(1.0, 64))
    runs, waits = (service.submit("emoji", SMALL) for _ in range(2))
    crew.taken()
    service.close()
    assert [one.state for one in (runs, waits)] == [State.POSTPONED] * 2
    service, crew = served(tmp_path, b=(1.0, 64))
    for _ in range(2):
        node, items = crew.taken()
        crew.done(node, items)
    until(lambda: [record.state for record in service.records()] == [State.DONE] * 2)


def test_pictures_are_enlarged_here_while_others_are_painted(served, monkeypatch):
    service, crew = served(a=(1.0, 64))
    release = threading.Event()

    def enlarge(ticket, order):
        assert release.wait(20)
        service._tell(ticket, Event("upscale", 1, 1, picture=order.options["image"]))
        service._end(ticket, State.DONE, summary={})

    monkeypatch.setattr(service, "_enlarge", enlarge)
    monkeypatch.setattr(service, "_check_upscaling", lambda order: None)
    options = {"image": Image.new("RGB", (8, 8))}
    painted = service.submit("emoji", SMALL)
    node, items = crew.taken()  # so that no machine is idle
    first, second = (service.submit("any", options, does="upscale") for _ in range(2))
    until(lambda: {*service.at_work} == {first, painted})
    crew.done(node, items)
    assert painted.wait(20) is State.DONE and second.state is State.WAITING
    release.set()
    assert [ticket.wait(20) for ticket in (first, second)] == [State.DONE] * 2
    assert len(first.images) == 1
