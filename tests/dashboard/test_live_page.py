"""The live page in a browser: what people see, with keys of the keyboard alone, at every width."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.dashboard.browser import Browser, require_browser
from tests.dashboard.page_server import page_server
from tests.support.fake_engine import Behaviour
from tests.support.gateways import gateway
from tests.support.live_server import fake_server
from tests.support.mock_replica import MockReplica
from tests.support.running import run

LIVE = "document.querySelector('#status')?.textContent === 'live'"
TILE = (
    "[...document.querySelectorAll('#tiles div')].find((t) => t.firstChild.textContent === '{}')"
    ".lastChild.textContent"
)
FIGURES = (
    "[...document.querySelectorAll('#charts figure')].filter((f) => !f.hidden)"
    ".map((f) => f.querySelector('h3').textContent)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser(require_browser()) as made:
        yield made


def text(browser: Browser, place: str) -> str:
    return str(browser.evaluate(f"document.querySelector('{place}').textContent"))


def test_a_server_shows_what_it_does(browser: Browser, text_model: Path, tmp_path: Path) -> None:
    with fake_server(text_model, tmp_path / "log", api_key=["secret"]) as server:
        browser.problems.clear()
        browser.open(f"{server.url}/dashboard")
        browser.until("document.activeElement.id === 'key'")
        browser.problems.clear()  # the console has the 401
        for wrong_or_right in ("wrong", "secret"):
            browser.evaluate(f"document.querySelector('#key').value = '{wrong_or_right}'")
            browser.press("Enter")
            if wrong_or_right == "wrong":
                browser.until("document.querySelector('#keyproblem').textContent.includes('not')")
        browser.until(LIVE)
        browser.problems.clear()
        body = {"prompt": [5, 6, 7], "max_tokens": 20}
        headers = {"Authorization": "Bearer secret"}
        for _ in range(3):
            httpx.post(
                f"{server.url}/v1/completions", json=body, headers=headers
            ).raise_for_status()
        browser.until(f"{TILE.format('TTFT p50')} !== '–'")
        assert "Time to first token" in browser.evaluate(FIGURES)
        assert browser.evaluate("document.querySelector('#replicas').hidden") is True
        assert "up" in text(browser, "#events")
        browser.evaluate("sessionStorage.clear()")
        browser.open(f"{server.url}/docs")
        browser.until("document.body.textContent.includes('/v1/chat/completions')")
        browser.open(f"{server.url}/")
        browser.until("document.querySelector('a[href=dashboard]') !== null")
        assert browser.problems == []


def test_hits_by_conversation_are_those_of_the_viewers_key(
    browser: Browser, text_model: Path, tmp_path: Path
) -> None:
    """Two conversations of one key, each of two turns; another key's conversation is not shown."""
    rows = (
        "[...document.querySelectorAll('#conversations tbody tr')]"
        ".map((r) => [...r.children].map((c) => c.textContent))"
    )
    behaviour = Behaviour(explains=True)
    with fake_server(text_model, tmp_path / "log", behaviour, api_key=["mine", "other"]) as server:
        for key, opening in (
            ("mine", "a"),
            ("mine", "b"),
            ("mine", "a"),
            ("other", "secret words"),
        ):
            messages = [
                {"role": "system", "content": "Be short."}, {"role": "user", "content": opening},
            ]  # fmt: skip
            httpx.post(
                f"{server.url}/v1/chat/completions",
                json={"messages": messages, "max_tokens": 2},
                headers={"Authorization": f"Bearer {key}"},
            ).raise_for_status()
        browser.open(f"{server.url}/")
        browser.until("document.querySelector('a') !== null")
        browser.evaluate("sessionStorage.setItem('millrace-key', 'mine')")
        browser.open(f"{server.url}/dashboard")
        browser.until(f"{rows}.length > 0")
        shown = browser.evaluate(rows)
        browser.evaluate("sessionStorage.clear()")
    assert sorted(row[1] for row in shown) == ["1", "2"]
    assert len({row[0] for row in shown}) == 2
    assert all(40 <= int(row[3].rstrip("%")) <= 50 for row in shown)


def test_a_replica_that_dies_is_seen_at_a_gateway(browser: Browser) -> None:
    cells = "[...document.querySelectorAll('#heat button')].map((b) => b.className)"

    def watch(url: str) -> None:
        browser.open(f"{url}/dashboard")
        browser.until(f"{LIVE} && {cells}.join() === 'l0,l0'")

    async def scenario() -> None:
        first, second = await MockReplica().start(), await MockReplica().start()
        try:
            async with gateway(first.url, second.url) as (_, target):
                await asyncio.to_thread(watch, str(target))
                await second.stop()
                await asyncio.to_thread(browser.until, f"{cells}[0] === 'down'")
                said = await asyncio.to_thread(text, browser, "#events")
                assert f"replica {second.url.removeprefix('http://')} down" in said
        finally:
            await first.stop()

    run(scenario(), timeout=120)


def test_a_thousand_replicas_have_the_worst_ones_first(browser: Browser) -> None:
    with page_server(1000) as (page, url):
        page.change(7, "down")
        page.change(9, "draining")
        browser.problems.clear()
        browser.open(f"{url}/dashboard", width=1400)
        browser.until(f"{LIVE} && document.querySelectorAll('#heat button').length === 1000")
        labels = (
            "[...document.querySelectorAll('#heat button')].slice(0, 3).map((b) => b.ariaLabel)"
        )
        down, draining, busy = browser.evaluate(labels)
        assert down.startswith("replica 7, down: connection refused")
        assert draining.startswith("replica 9, draining")
        assert ", up, " in busy
        assert "1 down, 1 draining, 998 up" in text(browser, "#summary")
        assert len(browser.evaluate(FIGURES)) == 12
        assert browser.problems == []


def test_the_keyboard_alone_is_enough(browser: Browser) -> None:
    with page_server(8) as (page, url):
        page.change(2, "down")
        browser.open(f"{url}/dashboard", width=1400)
        browser.until(f"{LIVE} && document.querySelectorAll('#heat button').length === 8")
        browser.press("1")
        assert browser.evaluate("document.querySelector('input[name=range]:checked').value") == "60"
        browser.press("t")
        assert browser.evaluate("document.documentElement.classList.contains('dark')")
        browser.evaluate("document.querySelector('#heat button[tabindex=\"0\"]').focus()")
        browser.press("ArrowRight")
        chosen = browser.evaluate("document.activeElement.ariaLabel")
        assert "down" not in chosen
        browser.press("Enter")
        browser.until("document.querySelector('#scope').value !== ''")
        browser.until(f"{TILE.format('tokens/s out')} !== '–'")
        browser.press("Escape")
        browser.until("document.querySelector('#scope').value === ''")
        browser.press("p")
        assert browser.evaluate("document.querySelector('#pause').ariaPressed") == "true"


@pytest.mark.parametrize(("replicas", "width"), [(1, 420), (8, 420), (1000, 420), (8, 1400)])
def test_nothing_is_cut_off(browser: Browser, replicas: int, width: int) -> None:
    with page_server(replicas) as (_, url):
        browser.open(f"{url}/dashboard", width=width)
        browser.until(f"{LIVE} && document.querySelectorAll('#charts canvas').length > 5")
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        outside = (
            "[...document.querySelectorAll('figure, #tiles div, #heat button')]"
            f".filter((e) => e.getBoundingClientRect().right > {width}).length"
        )
        assert browser.evaluate(outside) == 0
