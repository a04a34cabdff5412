"""The whole example in a headless Chromium: both roles, and a replica that dies in an answer.

What is asked of the model is that it answers, not that it is right: `accuracy.py` counts that.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.dashboard.browser import Browser, require_browser

ROOT = Path(__file__).parents[3]
SECONDS = 240.0
ANSWERED = "document.querySelector('#figures').textContent.length > 0"
DOOR = "document.querySelector('#door') && !document.querySelector('#door').hidden"
DESK = "document.querySelector('#desk') && !document.querySelector('#desk').hidden"

pytestmark = [pytest.mark.sweep, pytest.mark.timeout(600)]


class Example:
    """The running example. words: what it has printed."""

    def __init__(self, folder: Path) -> None:
        self._out = folder / "out.log"
        with self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "examples.insurance", "--policies", "20", "--folder",
                 str(folder), "--port", "8781", "--gateway-port", "8782"],
                stdout=out, stderr=out, cwd=ROOT,
            )  # fmt: skip
        end = time.monotonic() + SECONDS
        while "operator: password" not in self.words:
            assert self._process.poll() is None, self.words
            assert time.monotonic() < end, self.words
            time.sleep(0.2)
        found = re.search(r"policy (\S+), code (\S+); operator: password (\S+)", self.words)
        assert found
        self.policy, self.code, self.password = found.groups()
        self.url, self.gateway = "http://127.0.0.1:8781/", "http://127.0.0.1:8782"

    @property
    def words(self) -> str:
        return self._out.read_text()

    def engines(self) -> list[psutil.Process]:
        tree = psutil.Process(self._process.pid).children(recursive=True)
        return [one for one in tree if "millrace.replica.process" in one.cmdline()]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    require_browser()
    running = Example(tmp_path_factory.mktemp("insurance"))
    yield running
    running.stop()


@pytest.fixture
def page(example: Example) -> Iterator[Browser]:
    with Browser(require_browser()) as browser:
        browser.open(example.url, 1200, 800)
        browser.until(DOOR)
        yield browser


def submit(page: Browser, form: str, **fields: str) -> None:
    for name, value in fields.items():
        field = f"document.querySelector('{form} [name={name}]')"
        page.evaluate(f"{field}.value = {json.dumps(value)}")
    page.evaluate(f"document.querySelector('{form}').requestSubmit()")


def of_class(page: Browser, name: str) -> str:
    found = page.evaluate(f"document.querySelector('article .{name}').textContent")
    return str(found)


def test_a_customer_asks_and_reads(example: Example, page: Browser, tmp_path: Path) -> None:
    submit(page, "#customer", policy=example.policy, code="wrong")
    page.until("document.querySelector('#problem').textContent.includes('not right')")
    submit(page, "#customer", policy=example.policy, code=example.code)
    page.until(DESK)
    submit(page, "#ask", question="Is water damage from a washing machine covered?")
    page.until(ANSWERED)
    titles = ("Covered", "Not covered", "Unclear", "Not in your policy")
    assert of_class(page, "decision") in titles
    assert page.evaluate("document.querySelectorAll('article details li').length") == 5
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    page.open(example.url, 390, 800, dark=True)
    page.until(DESK)
    assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not [one for one in page.problems if "401" not in one and "403" not in one]


def test_an_operator_asks_for_a_claim(example: Example, page: Browser) -> None:
    from examples.insurance.documents.insurer import draw_insurer

    claim = next(c for p in draw_insurer(20).policies for c in p.claims)
    submit(page, "#operator", password=example.password)
    page.until(DESK)
    submit(page, "#ask", question=f"What is the status of claim {claim.number}?")
    page.until(f"document.querySelector('article .words')?.textContent.includes('{claim.status}')")


def test_an_answer_goes_on_when_its_replica_dies(example: Example, page: Browser) -> None:
    """Both replicas answer; one of their engines is killed after the first words."""
    submit(page, "#operator", password=example.password)
    page.until(DESK)
    for kind in ("hail", "fire", "storm", "theft of a bicycle"):
        submit(page, "#ask", question=f"Is {kind} covered?", policy=example.policy)
    page.until("document.querySelectorAll('article').length === 4")
    example.engines()[0].kill()
    page.until("[...document.querySelectorAll('article .feedback')].every((one) => !one.hidden)")
    assert page.evaluate("document.querySelector('#problem').textContent") == ""
    assert "millrace_gateway_resume_failed_total 0" in httpx.get(f"{example.gateway}/metrics").text
