"""Numbers for Prometheus, and a line in the log for whatever becomes of a job."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator

from fastapi import APIRouter, Request, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from ..jobs import State
from ..planner.choose import budget_of
from ..service import Service, Ticket

LOG = logging.getLogger("tightfit.jobs")
_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)

router = APIRouter(tags=["health"])


@router.get("/metrics", response_class=Response)
def metrics(request: Request) -> Response:
    """In Prometheus' text format."""
    return Response(generate_latest(request.app.state.numbers.registry), media_type=CONTENT_TYPE_LATEST)


class Numbers:
    """Counts jobs as they change. One for each service."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self._jobs = Counter("tightfit_jobs", "Jobs that ended, by how", ["state"], registry=self.registry)
        for state in State:
            if state.is_end:
                self._jobs.labels(state.value)
        self._stages = Histogram(
            "tightfit_stage_seconds",
            "Of jobs that are done",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._waits = Histogram(
            "tightfit_wait_seconds", "From asked to begun", buckets=_SECONDS, registry=self.registry
        )
        self._bytes = Gauge(
            "tightfit_job_peak_bytes", "Of the last job that is done", ["kind"], registry=self.registry
        )
        self._steps_down = Counter(
            "tightfit_steps_down", "Jobs that ran by another plan, as memory ran out", registry=self.registry
        )
        self._refusals = Counter(
            "tightfit_refusals", "Requests that were refused, by status", ["status"], registry=self.registry
        )
        self.registry.register(_Now(service))
        service.watch(self._watch)

    def refused(self, status: int) -> None:
        self._refusals.labels(str(status)).inc()

    def _watch(self, ticket: Ticket) -> None:
        follow(ticket, self._changed)

    def _changed(self, ticket: Ticket) -> None:
        record = ticket.record
        if record.state is State.RUNNING and record.started:
            self._waits.observe(record.started - record.created)
        if not record.state.is_end:
            return
        self._jobs.labels(record.state.value).inc()
        summary = record.summary
        if ticket.plan and "plan" in summary and summary["plan"][0] != ticket.plan.summary():
            self._steps_down.inc()
        for stages in summary.get("stages", ()):
            for stage, measured in stages.items():
                self._stages.labels(stage).observe(measured["seconds"])
        for kind, field in (("predicted", "predicted_bytes"), ("measured", "peak_bytes")):
            if field in summary:
                self._bytes.labels(kind).set(summary[field])


class _Now(Collector):
    """What is so at the moment that somebody asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[GaugeMetricFamily]:
        service = self._service
        running = len(service.at_work)
        queue = GaugeMetricFamily("tightfit_queue_jobs", "Jobs that run or wait", labels=["state"])
        queue.add_metric([State.RUNNING.value], running)
        queue.add_metric([State.WAITING.value], len(service.active) - running)
        yield queue
        budget_bytes = budget_of(service.hardware, service.wishes)
        yield GaugeMetricFamily("tightfit_budget_bytes", "What plans have to fit in", value=budget_bytes)
        loaded = GaugeMetricFamily("tightfit_loaded_bytes", "Held on the device", labels=["model"])
        for model, held_bytes in service.loaded().items():
            loaded.add_metric([model], held_bytes)
        yield loaded


def follow(ticket: Ticket, changed: Callable[[Ticket], object]) -> None:
    """Have `changed` called with a job each time its state is another, until it has ended."""
    before: State | None = None

    def look() -> None:
        nonlocal before
        if (now := ticket.state) is not before:
            before = now
            changed(ticket)
            if now.is_end:
                end()

    end = ticket.listen(look)
    look()


def journal(service: Service) -> None:
    """Write a line for each change of each job."""
    service.watch(lambda ticket: follow(ticket, _log))


def _log(ticket: Ticket) -> None:
    record = ticket.record
    since = record.started if record.state.is_end and record.started else record.created
    fields = {"job": record.id, "state": record.state.value, "model": record.order.model}
    fields |= {"seconds": round(time.time() - since, 3)}
    fields |= {"error": record.error} if record.error else {}
    LOG.info(" ".join(f"{name}={value}" for name, value in fields.items()), extra={"fields": fields})


class AsJson(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None) or {"said": record.getMessage()}
        told = {"time": round(record.created, 3), "level": record.levelname.lower(), **fields}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)
