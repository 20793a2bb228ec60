"""The page in a real browser: what is asked, shown and painted, against the API and a pipeline of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tightfit
from PIL import Image, PngImagePlugin
from tightfit.runtime.units import shown

httpx = pytest.importorskip("httpx", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}
WISHES = {"attention": "sdpa", "tiling": "whole", "cfg": "batched"}  # so few ways to run are costed
PLAIN = {"device": "cpu", "precision": "fp32", "residency": "resident", **WISHES}
PREVIEWS = {"preview_every": 2}  # the page's
SIDE = 64
NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
READY_MS = 20_000


@pytest.fixture(scope="module")
def server(serving, tmp_path_factory):
    """One with several ways to run, which paint the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.getbasetemp() / "config"))
        patch.delenv("TIGHTFIT_MODELS", raising=False)
        with serving(tmp_path_factory.mktemp("page"), residency="auto", **WISHES) as running:
            yield running


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root cannot have
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*arguments, "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A fresh tab, in which nothing may go wrong that a console tells."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page, wrong = context.new_page(), []
    page.set_default_timeout(READY_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Security Policy" in said.text else None)
    opened(page, server.url)
    yield page
    context.close()
    assert wrong == []


def opened(page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("html[data-ready]", state="attached")


def ask(page, prompt: str, **options) -> None:
    """Fill in the prompt and options by their names."""
    page.fill("#prompt", prompt)
    for name, value in options.items():
        page.fill(f"#{name}", str(value))


def planned(page) -> dict:
    """What the page has asked a plan for, once its bar shows the answer."""
    page.wait_for_timeout(80)  # longer than it waits for the next change
    page.wait_for_selector("#plan[aria-busy=false]")
    return json.loads(page.get_attribute("#plan", "data-asked"))


@contextmanager
def held(page) -> Iterator[None]:
    """No plan is answered meanwhile, also no glance at the way that was best."""
    routes = []
    page.route("**/v1/tightfit/plan", lambda route: routes.append(route))
    yield
    until(lambda: page.wait_for_timeout(10) or routes)
    for route in routes:
        route.continue_()
    page.unroute("**/v1/tightfit/plan")


def pale(page, names: list[str]) -> list[str]:
    """Those of the elements that are dimmed, or are becoming so."""
    script = """names => names.filter(name => {
        const node = document.querySelector(name);
        node.getAnimations().forEach(one => one.finish());
        return getComputedStyle(node).opacity < 1;
    })"""
    return page.evaluate(script, names)


def stages(page) -> dict[str, int]:
    """The bar's bytes by stage."""
    script = "rows => rows.map(row => [row.dataset.stage, Number(row.dataset.bytes)])"
    return dict(page.eval_on_selector_all("#bars li[data-stage]", script))


def jobs(server) -> list[dict]:
    return httpx.get(f"{server.url}/v1/tightfit/jobs").json()["jobs"]


def painted(page, server) -> tuple[dict, Image.Image]:
    """The newest job once the page shows its picture, and that picture."""
    newest = jobs(server)[0]["id"]
    page.wait_for_selector(f"#shown[src*='{newest}']")
    page.wait_for_selector(f"[data-key='{newest}-0']")
    job = httpx.get(f"{server.url}/v1/tightfit/jobs/{newest}").json()
    content = httpx.get(server.url + job["pictures"][0]).content
    return job, Image.open(io.BytesIO(content))


def until(condition, seconds: float = 20):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
    return value


def png(image: Image.Image, **texts: str) -> bytes:
    stream, info = io.BytesIO(), PngImagePlugin.PngInfo()
    for keyword, text in texts.items():
        info.add_text(keyword, text)
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def noise(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


# ------------------------------------------------------------------------------------------ in a browser


def test_a_picture_goes_from_prompt_to_gallery(page, server):
    ask(page, "a red heart", seed=7, **SMALL)
    planned(page)
    peak_bytes = max(stages(page).values())
    page.click("#paint")
    until(lambda: any(job["options"].get("prompt") == "a red heart" for job in jobs(server)))
    job, image = painted(page, server)
    assert job["summary"]["predicted_bytes"] == peak_bytes
    with tightfit.load("emoji", **PLAIN) as alone:
        assert image.convert("RGB").tobytes() == alone("a red heart", seed=7, **SMALL).tobytes()
    facts = page.inner_text("#caption-facts")
    assert "seed 7" in facts and "64×64" in facts and shown(job["summary"]["peak_bytes"]) in facts
    page.click("[data-send=seed]")
    assert page.input_value("#seed") == "7"


def test_the_bar_has_the_plans_numbers(page, server):
    ask(page, "a cat", num_inference_steps=3, guidance_scale=5)
    bars = []
    for side in (64, 192):
        page.fill("#width", str(side))
        asked = planned(page)
        assert (asked["width"], asked["guidance_scale"]) == (side, 5)
        answer = httpx.post(f"{server.url}/v1/tightfit/plan", json={**asked, **PREVIEWS}).json()
        best = answer["passes"][0]["plans"][0]
        words = page.inner_text("#bars")
        assert stages(page) == best["predicted"]["stages"]
        assert all(shown(count) in words for count in stages(page).values())
        assert shown(best["budget_bytes"]) in page.inner_text("#figures")
        assert page.inner_text("#reason").lower().startswith(best["reason"].lower())
        bars.append(stages(page))
    assert bars[0] != bars[1]


def test_the_bar_follows_before_all_ways_are_looked_at(page, server):
    """By the way that was best before, whose names the request has. An older answer does not stand."""
    planned(page)
    words = "#verdict", "#mini-words"
    places = [*words, "#figures", "#bars", "#reason", "#others", "#mini"]
    with held(page):
        page.fill("#width", "64")
        page.wait_for_selector("#plan[data-late]")
        assert all(page.inner_text(name).startswith("Planning") for name in words)
        assert pale(page, places) == places
    planned(page)
    assert page.inner_text("#verdict").startswith("It fits") and pale(page, places) == []
    waiting = []

    def taken(route):
        if "cfg" in route.request.post_data_json:
            route.continue_()
        else:
            waiting.append(route)

    page.route("**/v1/tightfit/plan", taken)
    page.fill("#width", "192")
    until(lambda: page.get_attribute("#plan", "data-shows") == "one way")
    asked = {"model": "emoji", "prompt": "", "width": 192}
    best = httpx.post(f"{server.url}/v1/tightfit/plan", json={**asked, **PREVIEWS}).json()["passes"][0][
        "plans"
    ][0]
    assert stages(page) == best["predicted"]["stages"] and page.get_attribute("#plan", "aria-busy") == "true"
    until(lambda: page.wait_for_timeout(10) or waiting)
    page.wait_for_selector("#plan[data-late]")
    assert all(page.inner_text(name).startswith("Planning") for name in words)
    for route in waiting:
        route.continue_()
    page.unroute("**/v1/tightfit/plan")
    assert planned(page)["width"] == 192
    assert page.inner_text("#mini-words").startswith("Fits") and pale(page, places) == []


@pytest.mark.parametrize("size", [(300, 200), (50, 90)])
def test_a_picture_is_fitted_as_the_server_fits_it(page, size):
    from tightfit.runtime.conditions.image import size_of
    from tightfit.runtime.conditions.input_pictures import open_picture
    from tightfit.runtime.models.hub import inspect

    picture = Image.new("RGB", size, "teal")
    page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": png(picture)})
    until(lambda: page.text_content("[data-state=image]"))
    asked = planned(page)
    assert (asked["height"], asked["width"]) == size_of(open_picture(picture), inspect("emoji"))


def test_another_way_is_a_click_away(page, server):
    planned(page)
    page.click("#others tbody button[aria-pressed=false] >> nth=0")
    asked = planned(page)
    answer = httpx.post(f"{server.url}/v1/tightfit/plan", json={**asked, **PREVIEWS}).json()
    assert asked["residency"] == answer["passes"][0]["plans"][0]["wishes"]["residency"]
    assert asked["residency"] in page.inner_text("#verdict") and page.is_visible("#pinned")
    page.click("#unpin")
    assert "residency" not in planned(page)


def test_a_refusal_stands_beside_its_control(page):
    page.fill("#width", "63")
    planned_not = page.wait_for_selector("#width-error:not(:empty)")
    assert "multiple" in planned_not.inner_text()
    assert page.get_attribute("#width", "aria-invalid") == "true" and "No plan" in page.inner_text("#verdict")
    assert not page.is_visible("#others")  # the table was of what was asked before
    with held(page):
        page.fill("#width", "64")
        assert "Planning" in page.inner_text("#verdict")  # at once
    page.wait_for_selector("#width-error:empty", state="attached")
    page.wait_for_selector("#others")


def test_a_model_that_cannot_be_used_says_why(page, server):
    rows = httpx.get(f"{server.url}/v1/tightfit/models").json()["models"]
    like = next(row for row in rows if row["name"] == "emoji")
    problems = {"old": "is a pickle", "torn": "cannot be read", "huge": "does not fit 600 MiB"}
    broken = [
        {**like, "name": name, "kind": "model", "plan": None, "fits": False, "problem": problem}
        for name, problem in problems.items()
    ]
    page.route("**/v1/tightfit/models", lambda route: route.fulfill(json={"models": [*rows, *broken]}))
    opened(page, page.url)
    until(lambda: page.locator("#model option[value=old]").count())
    words = page.eval_on_selector_all("#model option", "all => all.map(one => [one.value, one.text])")
    told = dict(words)
    assert {name: told[name] for name in problems} == {
        name: f"{name} · {problems[name]}" for name in problems
    }
    assert told["emoji"] == "emoji · fits"
    predicted = like["plan"]["predicted"]
    needed = shown(predicted["peak_bytes"] + predicted["context_bytes"])
    assert needed in page.inner_text("#model-fits")


def dropped(page, place: str, name: str, content: bytes, kind: str, event: str = "drop") -> None:
    """A file, dropped or pasted there."""
    page.eval_on_selector(
        place,
        """(node, [text, name, type, kind]) => {
            const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], name, { type }));
            const about = { bubbles: true, cancelable: true };
            node.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: data, ...about })
                : new ClipboardEvent(kind, { clipboardData: data, ...about }));
        }""",
        [base64.b64encode(content).decode(), name, kind, event],
    )


def test_what_is_no_picture_is_not_left_out(page, server):
    """In silence: it is said beside its control, and nothing is painted without it."""
    count = len(jobs(server))
    for place in ("image", "control"):
        page.click(f"#{place}-details > summary")
    text = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    given = b"no picture", "text/plain"
    ways = (
        ("image", lambda: page.set_input_files("#image", text)),
        ("control_image", lambda: dropped(page, "#control-details .drop", "notes.txt", *given)),
        ("control_image", lambda: dropped(page, "#control_image", "notes.txt", *given, "paste")),
    )
    for name, give in ways:
        page.focus(f"#{name}")
        give()
        page.wait_for_selector(f"#{name}-error:has-text('notes.txt is no picture')")
        planned(page)  # which clears the errors of other controls
        assert "notes.txt is no picture" in page.inner_text(f"#{name}-error")
        page.click("#paint")
        page.wait_for_selector("#problem:has-text('notes.txt is no picture')")
        page.click("button:text('Go on without it'):visible")
        assert not page.text_content(f"#{name}-error") and not page.text_content("#problem")
    assert len(jobs(server)) == count
    dropped(page, "#control-details .drop", "a.png", png(noise()), "image/png")
    until(lambda: page.text_content("[data-state=control]") == "on")
    assert not page.text_content("#control_image-error")


def test_what_is_not_masked_stays(page, server):
    given = noise()
    page.click("#image-details > summary")
    page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": png(given)})
    page.wait_for_selector("#mask")
    ask(page, "a dog", seed=3, num_inference_steps=2)
    page.eval_on_selector(
        "#brush-size", "input => { input.value = 20; input.dispatchEvent(new Event('input')); }"
    )
    page.locator("#mask").scroll_into_view_if_needed()
    place = page.locator("#mask").bounding_box()
    scale = place["width"] / SIDE
    x, y = (place["x"] + 20 * scale, place["y"] + 20 * scale)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 24 * scale, y, steps=4)
    page.mouse.up()
    page.click("#paint")
    until(lambda: any(job["options"].get("prompt") == "a dog" for job in jobs(server)))
    job, image = painted(page, server)
    assert {"image", "mask_image"} <= {*job["given"]} and image.size == (SIDE, SIDE)
    before, after = (np.asarray(one.convert("RGB"), int) for one in (given, image))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    away = np.hypot(rows - 20, columns - np.clip(columns, 20, 44))
    assert (before == after)[away > 7].all()  # the brush reaches 4.3
    assert (np.abs(before - after)[away < 1] > 8).mean() > 0.5
    page.press("#mask", "Control+z")
    assert page.text_content("[data-state=image]") == "on" and not covered(page)
    page.press("#mask", "Space")
    assert page.text_content("[data-state=image]") == "on, with a mask" and covered(page)
    page.click("text=Erase")
    page.press("#mask", "Space")
    assert not covered(page)


def covered(page) -> int:
    """Pixels under the mask."""
    return page.evaluate("""() => {
        const canvas = document.querySelector("#mask");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return data.filter((value, place) => place % 4 === 3 && value > 127).length;
    }""")


def test_what_somebody_else_asked_for_is_not_ended_from_here(page, server):
    """It is shown, as it is what one waits for."""
    options = {"prompt": "a fox", "num_inference_steps": 900, "width": SIDE, "height": SIDE}
    theirs = server.service.submit("emoji", options)
    opened(page, page.url)
    page.wait_for_selector("#running:visible")
    page.keyboard.press("Escape")
    assert not page.is_visible("#cancel") and not page.is_visible("#stop")
    assert theirs.wanted is None
    theirs.cancel()
    page.wait_for_selector("#running", state="hidden")


def test_a_second_pass_that_does_not_fit_is_said(page):
    refused = {
        "model": "emoji",
        "fits": False,
        "error": "the second pass does not fit",
        "passes": [{"notes": [], "plans": [{}]}, {"notes": [], "plans": []}],
    }
    page.route("**/v1/tightfit/plan", lambda route: route.fulfill(json=refused))
    page.fill("#width", "72")
    page.wait_for_selector("#verdict:has-text('No plan')")
    page.unroute_all()


def test_a_job_is_cancelled(page, server):
    ask(page, "a slow cat", num_inference_steps=900)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#running:visible")
    page.keyboard.press("Escape")
    until(lambda: jobs(server)[0]["state"] == "cancelled")
    page.wait_for_selector("#running", state="hidden")
    assert page.inner_text("#said") == "Cancelled."


def test_a_reload_finds_the_job_again(page, server):
    ask(page, "a slow dog", num_inference_steps=900)
    page.press("#prompt", "Enter")
    until(lambda: "of 900" in page.text_content("#status"))
    page.wait_for_selector("#frame.partial #shown[src^='data:']")
    opened(page, page.url)
    until(lambda: "of 900" in page.text_content("#status"))
    assert (page.input_value("#prompt"), page.input_value("#num_inference_steps")) == ("a slow dog", "900")
    page.click("#cancel")
    until(lambda: jobs(server)[0]["state"] == "cancelled")


def test_a_dropped_picture_restores_its_settings(page, server, tmp_path):
    with tightfit.load("emoji", **PLAIN) as alone:
        image = alone("a cake", seed=11, guidance_scale=4, scheduler="dpmpp_2m_karras", **SMALL)
    content = tightfit.save(image, tmp_path / "cake.png").read_bytes()
    dropped(page, "body", "cake.png", content, "image/png")
    until(lambda: page.input_value("#prompt") == "a cake")
    asked = planned(page)
    assert asked["guidance_scale"] == 4 and asked["num_inference_steps"] == 2
    page.click("#paint")
    until(lambda: any(job["options"].get("prompt") == "a cake" for job in jobs(server)))
    _, again = painted(page, server)
    assert again.convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_all_of_it(browser, server, scheme):
    context = browser.new_context(viewport={"width": 400, "height": 800}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    opened(page, server.url)
    page.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": png(noise())})
    planned(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    rgb = page.evaluate("getComputedStyle(document.body).color")
    assert (int(rgb.split("(")[1].split(",")[0]) > 128) is (scheme == "dark")
    before = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") != before
    place = page.locator("#mask")
    place.scroll_into_view_if_needed()
    place.tap()
    assert page.text_content("[data-state=image]") == "on, with a mask" and covered(page)
    context.close()


def test_the_keyboard_is_enough(page, server):
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the prompt
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a fish")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("""() => {
            const node = document.activeElement;
            const picture = node.firstChild?.alt;
            const name = node.labels?.[0]?.textContent || node.ariaLabel || node.textContent || picture;
            return [node.id, Boolean(name?.trim()), getComputedStyle(node).outlineStyle, node.tagName];
        }"""))  # fmt: skip
    assert not [row for row in reached if row[3] != "BODY" and not (row[1] and row[2] != "none")]
    names = [name for name, *_ in reached]
    order = ["model", "size", "width", "num_inference_steps", "scheduler", "seed", "paint"]
    assert [name for name in names if name in order] == [
        *order,
        *[n for n in names[names.index("paint") + 1 :] if n in order],
    ]
    page.focus("#num_inference_steps")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    until(lambda: any(job["options"].get("prompt") == "a fish" for job in jobs(server)))
    painted(page, server)


# ------------------------------------------------------------------------------------------ files, settings


def test_files_have_strict_types_and_are_sent_once(server):
    kinds = {
        "": "text/html",
        "page/style.css": "text/css",
        "page/app.js": "text/javascript",
        "page/icon.svg": "image/svg+xml",
    }
    for path, kind in kinds.items():
        answer = httpx.get(f"{server.url}/{path}")
        assert answer.status_code == 200 and answer.headers["content-type"].split(";")[0] == kind
        assert (answer.headers["cache-control"], answer.headers["x-content-type-options"]) == (
            "no-cache",
            "nosniff",
        )
        again = httpx.get(f"{server.url}/{path}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("page/page.py", "page/..%2fpage.py", "page/../app.py", "page/%2fetc%2fpasswd"):
        assert httpx.get(f"{server.url}/{path}").status_code == 404


def test_nothing_is_fetched_from_elsewhere():
    folder = Path(tightfit.__file__).parent / "runtime" / "server" / "page"
    texts = {file.name: file.read_text() for file in folder.iterdir()}
    own = "http://www.w3.org/2000/svg"  # a name, not an address
    assert texts and not [
        name
        for name, text in texts.items()
        if "//" in text.replace(own, "").replace("\n//", "") and "http" in text.replace(own, "")
    ]


def settings(server, content: bytes):
    kind = {"content-type": "application/octet-stream"}
    return httpx.post(f"{server.url}/page/api/settings", content=content, headers=kind)


def test_no_path_of_a_picture_is_opened(server, tmp_path):
    """One that would be an adapter, and lies outside the shelves."""
    flat = Path(tightfit.__file__).parent / "runtime" / "models" / "emoji" / "lora" / "flat.safetensors"
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(flat.read_bytes())
    said = {
        "model": "/etc/passwd",
        "precision": "fp32",
        "prompt": "a cat",
        "seed": 1,
        "adapters": {"lora": [f"{secret}:0.5", f"{flat}:0.8"]},
    }
    text = f"a cat\nSteps: 2, tightfit: {json.dumps(json.dumps(said))}"
    opens = []
    sys.addaudithook(lambda event, values: opens.append(values[0]) if event == "open" else None)
    answer = settings(server, png(noise(), parameters=text)).json()
    assert answer["options"]["lora"] == ["flat:0.8"] and answer["model"] is None
    assert any("secret" in notice for notice in answer["notices"])
    assert not [path for path in opens if "secret" in str(path) or "passwd" in str(path)]


def test_a_picture_of_another_program_is_understood(server):
    settings_line = "Steps: 9, Sampler: Euler a, CFG scale: 6.5, Seed: 5, Size: 128x64, Model: emoji"
    text = f"a boat\nNegative prompt: rain\n{settings_line}"
    answer = settings(server, png(noise(), parameters=text)).json()
    assert answer["model"] == "emoji"
    expected = {
        "prompt": "a boat",
        "negative_prompt": "rain",
        "num_inference_steps": 9,
        "seed": 5,
        "width": 128,
    }
    assert {name: answer["options"][name] for name in expected} == expected


@pytest.mark.parametrize("content", [b"", b"GIF89a", png(noise())])
def test_a_picture_that_says_nothing_is_one_sentence(server, content):
    answer = settings(server, content)
    assert answer.status_code == 422 and "the picture" in answer.json()["detail"]
    assert "/" not in answer.json()["detail"].split(":")[0]


def test_controls_are_those_of_the_fields(server):
    from tightfit.runtime.fields import described

    told = {one["name"]: one for one in httpx.get(f"{server.url}/page/api/controls").json()["options"]}
    known = {name: about for name, about in described(tightfit.Request).items() if about.help}
    assert known.keys() <= told.keys()
    for name, about in known.items():
        assert [told[name]["least"], told[name]["most"]] == list(about.bounds or (None, None))
        assert (told[name]["help"], told[name]["choices"]) == (about.help, list(about.choices))
