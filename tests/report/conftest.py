"""A report of a server without a model, made once for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from millrace.report.plan import Request, model_facts
from millrace.report.run import make_report
from millrace.report.steps.profiles import PROFILES
from tests.support.fake_engine import VARIABLE, Behaviour
from tests.support.serve_command import COMMAND

SECTIONS = ("accuracy", "batches", "prefix", "acceptance")


@pytest.fixture(scope="session")
def request_of(text_model: Path) -> Request:
    profile = msgspec.structs.replace(PROFILES["smoke"], max_model_len=4096)
    return Request(
        model=model_facts(str(text_model), text_model),
        profile=profile,
        sections=SECTIONS,
        serve_program=COMMAND,
    )


@pytest.fixture(scope="session")
def made(request_of: Request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a report."""
    directory = tmp_path_factory.mktemp("report")
    os.environ[VARIABLE] = msgspec.json.encode(Behaviour(tokens=4)).decode()
    try:
        assert make_report(request_of, directory, start_limit=60) == 0
    finally:
        del os.environ[VARIABLE]
    return directory
