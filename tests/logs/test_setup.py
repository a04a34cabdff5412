"""The one format of all logs: text and JSON, levels, and lines of child processes."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from millrace.errors import ConfigError
from millrace.logs import setup as logs
from millrace.logs.progress import Due
from millrace.logs.setup import LogOptions, relay_line, set_up_logs

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"
logger = logging.getLogger("millrace.test")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loggers and variables as they were before."""
    for name in (logs.LEVEL_VARIABLE, logs.FORMAT_VARIABLE, logs.REPLICA_VARIABLE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    root, ours = logging.getLogger(), logging.getLogger("millrace")
    before = root.handlers[:], root.level, ours.level
    yield
    root.handlers[:], level, own = before
    root.setLevel(level)
    ours.setLevel(own)


def fail() -> None:
    raise ValueError("on purpose")


def test_a_text_line_has_time_level_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("server")
    logger.warning("%d things", 3)
    assert re.fullmatch(rf"{STAMP} WARNING server: 3 things\n", capsys.readouterr().err)


def test_a_json_line_has_the_same_and_further_figures(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logs("engine", LogOptions(log_format="json"))
    logger.info("2 lines:\n%s", "x", extra={"fields": {"running": 2}})
    try:
        fail()
    except ValueError:
        logger.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d{4}", first.pop("time"))
    assert first == {
        "level": "info",
        "source": "engine",
        "logger": "millrace.test",
        "message": "2 lines:\nx",
        "running": 2,
    }
    assert second["exception"].endswith("ValueError: on purpose")


def test_the_level_applies_to_our_lines_and_other_packages_give_no_details(
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logs("server", LogOptions(log_level="debug"))
    logger.debug("ours")
    logging.getLogger("other").debug("theirs")
    assert capsys.readouterr().err.endswith("DEBUG server: ours\n")
    set_up_logs("server", LogOptions(log_level="error"))
    logger.warning("ours")
    logging.getLogger("other").warning("theirs")
    assert capsys.readouterr().err == ""


def test_children_get_level_format_and_the_name_of_the_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(logs.REPLICA_VARIABLE, "replica 3")
    set_up_logs("server", LogOptions(log_level="debug", log_format="json"))
    program = (
        "import logging; from millrace.logs.setup import set_up_logs\n"
        "set_up_logs('engine'); logging.getLogger('millrace').debug('hello')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    line = json.loads(done.stderr)
    assert (line["source"], line["level"]) == ("replica 3 engine", "debug")


def test_a_variable_that_names_no_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.LEVEL_VARIABLE, "loud")
    with pytest.raises(ConfigError, match="MILLRACE_LOG_LEVEL 'loud': use critical, error"):
        set_up_logs("server")


@pytest.mark.parametrize("style", ["text", "json"])
def test_lines_of_a_child_get_the_format_once(
    style: logs.LogFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logs("supervisor", LogOptions(log_format=style))
    logger.info("one of ours")
    ours = capsys.readouterr().err.rstrip("\n")
    relay_line("replica 1", ours)
    relay_line("replica 1", "INFO 11-30 [loader.py:17] of another server")
    first, second = capsys.readouterr().err.splitlines()
    assert first == ours
    if style == "text":
        assert re.fullmatch(rf"{STAMP} INFO replica 1: INFO 11-30 .*", second)
    else:
        assert json.loads(second)["source"] == "replica 1"


def test_lost_lines_are_reported_in_the_format() -> None:
    """The descriptor is a full disk first, and then a pipe."""
    program = (
        "import logging, os, sys\n"
        "from millrace.logs.setup import LogOptions, set_up_logs\n"
        "from millrace.common.safe_log import protect_standard_streams\n"
        "reader = os.dup(2); os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "protect_standard_streams(); set_up_logs('server', LogOptions(log_format='json'))\n"
        "log = logging.getLogger('millrace'); log.info('lost'); sys.stderr.writer.flush(10)\n"
        "os.dup2(reader, 2); log.info('there')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first, second = map(json.loads, done.stderr.splitlines())
    assert first["message"] == "1 log lines were lost (No space left on device)"
    assert second["message"] == "there"


def test_slow_work_is_told_when_a_line_is_due() -> None:
    assert not Due(60.0)
    assert Due(-1.0)
