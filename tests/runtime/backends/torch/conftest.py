"""What torch's allocator hands out, by its own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def allocated() -> Callable[[Callable[[], Any]], int]:
    """Called with a call: most bytes that torch's allocator had handed out at once during it, beyond those
    before it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def measured(call: Callable[[], Any]) -> int:
        with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            kept = call()
        now = most = 0
        events: Any = seen.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        del kept
        return most

    return measured
