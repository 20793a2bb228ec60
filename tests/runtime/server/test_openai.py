"""OpenAI's API by OpenAI's own client, beside the pipeline in Python."""

from __future__ import annotations

import base64
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import tightfit
from PIL import Image
from tightfit.benchmarks import clients

openai = pytest.importorskip("openai")
SMALL = {"num_inference_steps": 2, "width": 64, "height": 64}
TWO_STEPS = {"extra_body": {"seed": 7, "num_inference_steps": 2}}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def local():
    with tightfit.load("emoji", device="cpu", precision="fp32", residency="resident") as pipe:
        yield pipe


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def opened(answered) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(answered.b64_json)))


def file_of(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pizza(local) -> Image.Image:
    return local("a pizza", seed=1, **SMALL)


def test_generations_paint_what_python_paints(client, local):
    answer = client.images.generate(prompt="a red heart", model="emoji", n=2, size="64x64", **TWO_STEPS)
    expected = local("a red heart", seed=7, num_images=2, **SMALL)
    assert [pixels(opened(one)) for one in answer.data] == [pixels(one) for one in expected]
    assert (answer.size, answer.quality, answer.output_format) == ("64x64", "medium", "png")
    assert answer.usage.input_tokens_details.text_tokens == 3
    assert answer.usage.output_tokens == 2 * 64 * 64 // local.spec.downsampling**2
    assert opened(answer.data[0]).info["parameters"].startswith("a red heart")


def test_quality_is_steps_and_sizes_are_rounded(client):
    answer = client.images.generate(prompt="a", quality="low", size="66x64")
    assert "Steps: 10," in opened(answer.data[0]).info["parameters"]
    assert (answer.quality, answer.size) == ("low", "64x64")


@pytest.mark.parametrize("model", ["dall-e-3", "gpt-image-2.5-flare", None])
def test_names_that_clients_send_unasked_are_the_one_that_is_served(client, model):
    named = {} if model is None else {"model": model}
    answer = client.images.generate(prompt="a", size="64x64", **named, **TWO_STEPS)
    (one,) = answer.data
    assert (one.url is not None) == (model == "dall-e-3") and (one.url or one.b64_json)


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_formats_and_addresses(client, form):
    about = {"output_format": form, "output_compression": 40, "size": "64x64", **TWO_STEPS}
    answer = client.images.generate(prompt="a red heart", response_format="b64_json", **about)
    here = opened(answer.data[0])
    there = httpx.get(
        client.images.generate(prompt="a red heart", response_format="url", **about).data[0].url
    )
    assert here.format == form.upper() and there.headers["content-type"] == f"image/{form}"
    assert pixels(Image.open(BytesIO(there.content))) == pixels(here)


def test_edits_without_a_mask_begin_with_the_picture(client, local, pizza):
    answer = client.images.edit(image=file_of(pizza), prompt="a red heart", size="64x64", **TWO_STEPS)
    expected = local("a red heart", image=pizza, strength=0.8, seed=7, **SMALL)
    assert pixels(opened(answer.data[0])) == pixels(expected)


def test_edits_paint_where_the_mask_is_transparent(client, local, pizza):
    hole = np.full((64, 64), 255, np.uint8)
    hole[:, 32:] = 0
    mask = Image.fromarray(np.dstack([np.zeros((64, 64, 3), np.uint8), hole]))
    about = {"prompt": "a red heart", "size": "64x64", **TWO_STEPS}
    answer = client.images.edit(image=[file_of(pizza)], mask=file_of(mask), **about)
    expected = local("a red heart", image=pizza, mask_image=Image.fromarray(255 - hole), seed=7, **SMALL)
    painted = opened(answer.data[0])
    assert pixels(painted) == pixels(expected)
    kept, was = np.asarray(painted.convert("RGB"))[:, :28], np.asarray(pizza)[:, :28]
    assert (kept == was).all()


def test_edits_refer_to_pictures_where_the_model_reads_such(pizza):
    from tightfit.runtime.server.failures import RefusedError
    from tightfit.runtime.server.openai import _given_pictures

    spec: Any = SimpleNamespace(design=SimpleNamespace(reference_pixels=1))
    hole = Image.fromarray(np.zeros((64, 64, 4), np.uint8))

    def names(images, others=None, **options):
        return {*_given_pictures(images, options, others or {}, spec)}

    both = _given_pictures([pizza], {"prompt": "a", "reference": hole}, {}, spec)
    assert both == {"reference": [pizza, hole]}  # one sent by our own name is not dropped
    with pytest.raises(RefusedError, match="input_fidelity must be one of"):
        names([pizza], {"input_fidelity": "lowest"}, prompt="a")
    assert names([pizza, hole], prompt="a") == names([pizza], prompt="a") == {"reference"}
    assert names([pizza], prompt="") == names([pizza], prompt="a", strength=0.5) == {"image", "strength"}
    assert names([hole], prompt="a") == names([pizza], {"mask": hole}, prompt="a") == {"image", "mask_image"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_variations_begin_with_the_picture_and_have_no_prompt(client, local, pizza):
    answer = client.images.create_variation(image=file_of(pizza), n=1, size="64x64", **TWO_STEPS)
    expected = local("", image=pizza, strength=0.8, seed=7, **SMALL)
    assert pixels(opened(answer.data[0])) == pixels(expected)


def test_a_stream_has_pictures_on_the_way_and_each_that_is_done(client, local):
    stream = client.images.generate(
        prompt="a red heart",
        size="64x64",
        n=2,
        stream=True,
        partial_images=2,
        extra_body={"seed": 7, "num_inference_steps": 12},
    )
    events = list(stream)
    done = [event for event in events if event.type == "image_generation.completed"]
    expected = local("a red heart", seed=7, num_images=2, **SMALL | {"num_inference_steps": 12})
    assert [pixels(opened(event)) for event in done] == [pixels(one) for one in expected]
    assert done[0].usage.output_tokens > 0 and done[0].size == "64x64"
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert partial and partial[0].partial_image_index == 0 and opened(partial[0]).size == (64, 64)


def test_a_client_that_leaves_cancels_its_job(client, server):
    about = {"num_inference_steps": 900}
    with client.images.generate(prompt="a", size="64x64", stream=True, extra_body=about):
        ticket = server.service.active[-1]
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.5).images.generate(prompt="a", size="64x64", extra_body=about)
    assert ticket.wait(60).value == "cancelled"
    for other in server.service.active:
        assert other.wait(60).value == "cancelled"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "row"),
    [(name, row) for name in ("openai", "tightfit") for row in clients.CLIENTS[name][1]],
    ids=lambda one: one if isinstance(one, str) else one.method,
)
def test_each_row_of_the_page_is_so(server, name, row):
    said = clients.outcome(row, clients.CLIENTS[name][0](server.url))
    assert bool(said) == bool(row.refused) and row.refused in said, said


@pytest.mark.parametrize(
    ("asked", "said", "code"),
    [
        ({"model": "nothing"}, "does not exist", "model_not_found"),
        ({"model": "../emoji"}, "does not exist", "model_not_found"),
        ({"size": "huge"}, "a size such as", None),
        ({"size": "99999x99999"}, "pixels|a size such as", None),
        ({"background": "transparent"}, "background must be one of auto, opaque", "invalid_value"),
        ({"output_format": "svg"}, "output_format must be one of", "invalid_value"),
        ({"quality": "best"}, "quality must be one of", "invalid_value"),
        ({"n": 5000}, "images are asked for", None),
        ({"n": 0}, "from 1 to 10", None),
        ({"partial_images": 9, "stream": True}, "from 0 to 3", None),
        ({"output_compression": 500}, "from 0 to 100", None),
        ({"extra_body": {"sed": 7}}, "did you mean seed", "unknown_parameter"),
        ({"extra_body": {"image": "QUFB"}}, "no picture that can be read", None),
    ],
)
def test_errors_are_openais_objects(client, asked, said, code):
    import re

    with pytest.raises(openai.APIStatusError) as raised:
        client.images.generate(prompt="a", **asked)
    error = raised.value
    assert error.status_code == (404 if code == "model_not_found" else 400)
    assert re.search(said, error.body["message"]) and error.code == code
    assert error.type == "invalid_request_error"


def test_edits_that_cannot_be(client, pizza):
    with pytest.raises(openai.BadRequestError, match="transparent where to paint"):
        client.images.edit(image=file_of(pizza), mask=file_of(pizza), prompt="a")
    with pytest.raises(openai.BadRequestError, match="one picture is edited"):
        client.images.edit(image=[file_of(pizza)] * 2, prompt="a")
    with pytest.raises(openai.BadRequestError, match="image is missing"):
        client.post("/images/edits", body={"prompt": "a"}, cast_to=object)
    with pytest.raises(openai.BadRequestError, match="prompt is missing"):
        client.post("/images/generations", body={}, cast_to=object)
