"""What comes before a picture: planning, reading headers and tokenising. Run as test_kernels.py says."""

from __future__ import annotations

import pytest

from .. import Request, inspect, plan, profile
from ..export import random_model
from ..runtime.models.tokens import tokenize


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sdxl"):
        random_model.write(family, root / family, tiny=True, precision="fp16")
    return root


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_plan(benchmark, models, family):
    """Every candidate for a card of 6 GB, each time with empty caches."""
    benchmark.group = "plan"
    card = profile("rtx-2060")
    benchmark.pedantic(
        plan,
        setup=lambda: ((card, inspect(str(models / family)), Request("a", seed=0)), {}),
        rounds=3,
        iterations=1,
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_inspect(benchmark, models, family):
    benchmark.group = "inspect"
    benchmark(inspect, str(models / family))


@pytest.mark.parametrize("who", ["tightfit", "transformers"])
def test_tokenize(benchmark, models, who):
    """77 tokens, against transformers' own tokenizer, which is read anew each time, as ours is."""
    spec = inspect(str(models / "sd1"))
    text = "a lighthouse at dusk, oil on canvas, " * 4
    benchmark.group = "tokenize"
    if who == "tightfit":
        benchmark(tokenize, spec, spec.text_encoders[0], {"prompt": text})
        return
    from transformers import AutoTokenizer

    def transformers_tokens() -> object:
        return AutoTokenizer.from_pretrained(spec.folder / "tokenizer")(
            text, padding="max_length", truncation=True, max_length=77
        )

    benchmark(transformers_tokens)
