"""The queue: order, errors, cancelling; pictures are those that a pipeline paints alone."""

from __future__ import annotations

import threading

import pytest
import tightfit
from tightfit.runtime.errors import TightfitError
from tightfit.runtime.service import Limits

SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}


def request(seed: int, **others) -> tightfit.Request:
    return tightfit.Request("a cat", seed=seed, **SMALL | others)


@pytest.fixture
def service():
    with tightfit.Service(device="cpu", precision="fp32") as service:
        yield service


def test_requests_for_several_models_run_in_their_order(service, tiny_models):
    models = [str(tiny_models[family]) for family in ("sd1", "sdxl", "sd1")]
    tickets = [service.submit(model, request(seed)) for seed, model in enumerate(models)]
    ended, waiting = (
        [],
        [threading.Thread(target=lambda n=n: (tickets[n].result(), ended.append(n))) for n in range(3)],
    )
    for thread in reversed(waiting):
        thread.start()
    for thread in waiting:
        thread.join()
    assert ended == [0, 1, 2]
    results = [ticket.result() for ticket in tickets]  # asked for once more
    for number, result in enumerate(results):
        with tightfit.load(models[number], device="cpu", precision="fp32") as alone:
            assert result.images[0].tobytes() == alone.generate(request(number)).images[0].tobytes()


def test_events_come_as_they_happen_and_one_failure_is_nobody_elses(service, sd1, tmp_path):
    missing = service.submit(str(tmp_path / "nothing"), request(1))
    uneven = service.submit(str(sd1), request(1, width=63))
    good = service.submit(str(sd1), request(1))
    stages = [event.stage for event in good.events()]
    assert (stages[0], stages[-1], stages.count("denoise")) == ("encode", "done", 2)
    with pytest.raises(TightfitError, match="does not exist"):
        missing.result()
    with pytest.raises(TightfitError, match="multiple"):
        uneven.result()
    with pytest.raises(TightfitError, match="prompt must be text"):
        service.submit(str(sd1), tightfit.Request(3))


def test_what_is_cancelled_stops_and_the_next_goes_on(service, sd1):
    running, waiting, last = (
        service.submit(str(sd1), request(seed, num_inference_steps=60)) for seed in range(3)
    )
    seen = 0
    waiting.cancel()
    with pytest.raises(TightfitError, match="cancelled"):
        for _ in running.events():
            seen += 1
            running.cancel()
    assert seen < 60
    with pytest.raises(TightfitError, match="cancelled"):
        waiting.result()
    assert last.result().images


def test_a_full_queue_refuses_and_closing_ends_what_waits(sd1):
    service = tightfit.Service(device="cpu", limits=Limits(waiting=2), precision="fp32")
    tickets = []
    with pytest.raises(TightfitError, match="2 requests wait already"):
        for seed in range(10):
            tickets.append(service.submit(str(sd1), request(seed, num_inference_steps=500)))
    service.close()
    for ticket in tickets:
        with pytest.raises(TightfitError, match="cancelled"):
            ticket.result()
    with pytest.raises(TightfitError, match="closed"):
        service.submit(str(sd1), request(1))
