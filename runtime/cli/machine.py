"""`tightfit info` and `tightfit calibrate`: what this machine is, and how fast."""

from __future__ import annotations

from .. import interrupts
from ..machine.hardware import Hardware
from ..units import shown
from .options import Device
from .output import say


def info(device: Device = "auto") -> None:
    """Say what this machine is, what is free on it now, and what could not be found out."""
    from ..machine.providers import providers

    machine = Hardware.detect(device)
    capability = ", capability {}.{}".format(*machine.capability) if machine.capability else ""
    beside = [f"{shown(machine.context_bytes)} of it for the process itself"] if machine.context_bytes else []
    if machine.device != "cpu":
        beside = [f"{shown(machine.host_bytes)} free in the host"] if machine.host_bytes else []
    memory = f"memory: {shown(machine.free_bytes)} free of {shown(machine.total_bytes)}"
    rates = ", ".join(f"{name} {machine.rate(name) / 1e12:.2f}" for name in machine.precisions)
    origin = "measured here" if machine.calibrated else "estimated"
    say(f"{machine.name} ({machine.device}{capability})")
    say("; ".join([memory, *beside]))
    say(f"computes in: {rates} TFLOP/s, {machine.bandwidth / 1e9:.0f} GB/s ({origin})")
    say(f"ONNX Runtime: {', '.join(providers()) or 'not installed'}")
    for note in machine.notes:
        say(f"note: {note}")


def calibrate(device: Device = "auto") -> None:
    """Measure this machine once (under a minute), so that predicted seconds are its own."""
    from ..backends.torch import calibration

    hardware = Hardware.detect(device)
    interrupts.tidily()
    measured = calibration.calibrate(hardware)
    rates = ", ".join(
        f"{kind} {rate / 1e12:.3f}" for kind, rate in measured["rates"].items() if "unpack" not in kind
    )
    attention = ", ".join(f"{kind} {rate / 1e12:.3f}" for kind, rate in measured["attention_rates"].items())
    say(f"TFLOP/s: {rates}; attention: {attention}")
    speeds = ", ".join(f"{name} {measured[name] / 1e9:.1f}" for name in ("bandwidth", "bus", "read"))
    starts = ", ".join(
        f"{kind or 'light'} {seconds * 1e6:.0f}" for kind, seconds in measured["starts"].items()
    )
    others = f"others {measured['call_seconds'] * 1e6:.1f}"
    say(f"GB/s: {speeds}; µs to start an operator, or once for a network's parts: {starts}, {others}")
    say(f"kept in {calibration.save(hardware, measured)}")
