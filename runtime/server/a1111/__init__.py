"""AUTOMATIC1111's API, `/sdapi/v1`, and its ControlNet extension's, as their clients speak to them."""

from __future__ import annotations

from fastapi import APIRouter

from . import control, extras, facts, painting

router = APIRouter()
for part in (painting, extras, facts):
    router.include_router(part.router, prefix="/sdapi/v1")
router.include_router(control.router)
