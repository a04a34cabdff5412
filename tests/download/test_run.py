"""Downloads from a hub that does whatever hubs and networks have been seen to do."""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from millrace.cli import cli
from millrace.common.backoff import BackoffPolicy
from millrace.download import destination, fetcher, hub, run
from millrace.download.fetcher import Limits
from millrace.download.journal import Journal
from millrace.download.run import Request
from millrace.errors import UserError
from millrace.model_lookup import find_model
from tests.download.fake_hub import COMMIT, MODEL, FakeHub, Faults, Handler, fake_hub, large_file
from tests.download.kills import killed_until_done

FILES = {
    "config.json": b'{"model_type": "qwen3_5"}',
    "nested/tokenizer.json": b"{}" * 1000,
    "empty.txt": b"",
    "model-1.safetensors": large_file(3_000_001, 1),
    "model-2.safetensors": large_file(700_000, 2),
    "pytorch_model.bin": b"pickled",
}
CHUNK = fetcher.SPAN_BYTES[0]
WANTED = sorted(set(FILES) - {"pytorch_model.bin"})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetcher, "SPAN_BYTES", (1 << 18, 1 << 18))
    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.5)
    quick = Limits(slowest=1000, patience=0.3, backoff=BackoffPolicy(first=0.01, longest=0.1))
    monkeypatch.setattr(run, "Limits", lambda workers: Limits(
        workers, quick.tries, quick.slowest, quick.patience, quick.backoff))  # fmt: skip
    for variable in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with fake_hub(dict(FILES)) as found:
        yield found


def fetch(server: FakeHub, tmp_path: Path, **options: Any) -> Path:
    options = {"local_dir": tmp_path / "out", "quiet": True} | options
    return run.run(Request(model=MODEL, endpoint=server.url, **options))


def assert_whole(directory: Path, names: list[str] = WANTED) -> None:
    there = [path for path in directory.rglob("*") if path.is_file()]
    found = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in there
        if destination.STATE_FOLDER not in path.parts
    }
    assert found == {name: FILES[name] for name in names}


@pytest.mark.parametrize(
    "faults",
    [
        Faults(),
        Faults(cut_every=100_000),
        Faults(no_ranges=True),
        Faults(no_ranges=True, stall=2),
        Faults(etags=6),
        Faults(stall=3),
        Faults(drip=2),
        Faults(corrupt=1),
        Faults(corrupt=2, cut_every=300_000),
        Faults(expire=2),
        Faults(refuse=[(503, {"Retry-After": "0"}), (500, {}), (429, {"Retry-After": "0"})]),
        Faults(wrong_range=3),
    ],
    ids=lambda faults: str(faults).replace("Faults", ""),
)
def test_whatever_happens_on_the_way_the_files_are_right(
    server: FakeHub, tmp_path: Path, faults: Faults
) -> None:
    server.faults = faults
    assert_whole(fetch(server, tmp_path))


def test_nothing_is_fetched_twice(server: FakeHub, tmp_path: Path) -> None:
    server.faults = Faults(cut_every=100_000)
    fetch(server, tmp_path)
    assert server.sent["model-1.safetensors"] == len(FILES["model-1.safetensors"])
    count = len(server.requests)
    fetch(server, tmp_path)
    assert [path for path, _ in server.requests[count:]] == [
        f"/api/models/{MODEL}/revision/main?blobs=true"
    ]


def test_the_cache_is_that_of_hugging_faces_tools(server: FakeHub, tmp_path: Path) -> None:
    directory = fetch(server, tmp_path, local_dir=None)
    assert directory.parts[-4:] == ("hub", "models--maker--model", "snapshots", COMMIT)
    assert_whole(directory)
    assert find_model(MODEL) == find_model(MODEL, COMMIT) == directory
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cache = directory.parents[2]
    assert snapshot_download(MODEL, cache_dir=cache, local_files_only=True) == str(directory)
    assert try_to_load_from_cache(MODEL, "config.json", cache_dir=cache)


def test_a_name_leads_to_a_model_only_when_all_of_it_is_there(
    server: FakeHub, tmp_path: Path
) -> None:
    server.faults = Faults(corrupt=1000)
    with pytest.raises(UserError, match=r"3 times the right number of bytes with a wrong digest"):
        fetch(server, tmp_path, local_dir=None)
    with pytest.raises(UserError, match="millrace download"):
        find_model(MODEL)
    server.faults = Faults()
    assert find_model(MODEL) if fetch(server, tmp_path, local_dir=None) else False


def test_the_token_goes_to_the_hub_alone_and_into_no_message(
    server: FakeHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.token = "hf_secret"
    with pytest.raises(UserError, match="needs a token: set HF_TOKEN"):
        fetch(server, tmp_path)
    with pytest.raises(UserError, match="the token has no access") as caught:
        fetch(server, tmp_path, token="hf_wrong")
    server.faults = Faults(expire=1, cut_every=500_000)
    with fake_hub(dict(FILES)) as other:  # where the hub redirects to
        other.uses = {str(number): 0 for number in range(100)}
        _redirect(server, other, monkeypatch)
        assert_whole(fetch(server, tmp_path, token="hf_secret"))
    assert other.requests
    assert not any("Authorization" in headers for _, headers in other.requests)
    assert "hf_" not in caplog.text + str(caught.value)


def _redirect(server: FakeHub, other: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a hub send clients to another host for large files."""
    plain = Handler.answer

    def answer(self: Any, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        if "Location" in headers and self.shared is server:
            headers = {"Location": other.url + headers["Location"]}
        plain(self, status, headers, body)

    monkeypatch.setattr(Handler, "answer", answer)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_everything_goes_through_a_proxy(server: FakeHub, tmp_path: Path, variable: str) -> None:
    others = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    command = [sys.executable, "-m", "millrace", "download", MODEL, "--local-dir", "out"]
    command += ["--endpoint", "http://hub.invalid"]  # which only the proxy can reach
    subprocess.run(command, env=others | {variable: server.url}, cwd=tmp_path, check=True)
    assert_whole(tmp_path / "out")
    assert {urlsplit(path).netloc for path, _ in server.requests} == {"hub.invalid"}


def test_a_source_that_gives_nothing_ends_in_one_line(server: FakeHub, tmp_path: Path) -> None:
    server.faults = Faults(refuse=[(500, {})] * 10_000)
    with pytest.raises(UserError, match=r"11 tries in a row failed, .* answered 500; what arrived"):
        fetch(server, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["maker/none"], "there is none; check the name and --revision"),
        (["model"], "a name on the hub is owner/name"),
        ([f"{MODEL}@v9"], "revision 'v9', at .*: there is none"),
        ([f"{MODEL}@../x"], "a branch, a tag or a commit is expected"),
        ([f"{MODEL}@a", "--revision", "b"], "after the @ and --revision"),
        ([MODEL, "--include", "*.nothing"], "no file is left .* there are: config.json"),
        ([MODEL, "--cache-dir", "a", "--local-dir", "b"], "--local-dir or --cache-dir, not both"),
        (["gs://bucket/model"], "--local-dir says where"),
        (["gs://bucket/model", "--local-dir", "x"], "gs:// needs gcsfs; pip install gcsfs"),
        ([], "name a model"),
        (["--verify", "/nowhere"], "/nowhere: no such directory"),
        ([MODEL, "--endpoint", "http://127.0.0.1:1"], "cannot be reached .* HF_ENDPOINT names"),
        ([MODEL, "--local-dir", "/proc/x"], "a model cannot be put there"),
    ],
)
def test_bad_input_is_answered_in_one_line(
    server: FakeHub, tmp_path: Path, arguments: list[str], said: str
) -> None:
    if "--endpoint" not in arguments and arguments[:1] != ["--verify"]:
        arguments = [*arguments, "--endpoint", server.url]
    done = subprocess.run(
        [sys.executable, "-m", "millrace", "download", *arguments],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.search(said, line), line


def test_files_that_lead_elsewhere_are_refused(server: FakeHub, tmp_path: Path) -> None:
    server.files["../outside.safetensors"] = b"x"
    with pytest.raises(UserError, match="leads elsewhere"):
        fetch(server, tmp_path)
    assert not (tmp_path / "outside.safetensors").exists()


def test_room_is_looked_for_first(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "free_bytes", lambda _: 2_000_000)
    with pytest.raises(UserError, match=r"3\.7 MB are to come and 2\.0 MB are free; make room"):
        fetch(server, tmp_path)
    assert not server.sent


def test_a_disk_that_fills_up_ends_in_one_line_and_the_rest_comes_later(
    server: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, count = Journal.write, 0

    def write(self: Journal, start: int, piece: bytes) -> None:
        nonlocal count
        count += len(piece)
        if count > 1_500_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, start, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", write)
        with pytest.raises(UserError, match="No space left on device; make room"):
            fetch(server, tmp_path, max_workers=1)
    before = sum(server.sent.values())
    assert_whole(fetch(server, tmp_path))
    assert sum(server.sent.values()) - before < sum(map(len, FILES.values())) - 1_000_000


def test_other_files_by_pattern_and_a_list_without_fetching(
    server: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(server, tmp_path, dry_run=True)
    assert capsys.readouterr().out.count("to come") == len(WANTED)
    assert not server.sent
    assert_whole(
        fetch(server, tmp_path, include=["*.bin", "c*"]), ["config.json", "pytorch_model.bin"]
    )


def test_verify_finds_what_changed(server: FakeHub, tmp_path: Path) -> None:
    plain = fetch(server, tmp_path)
    snapshot = fetch(server, tmp_path, local_dir=None)
    for directory in (plain, snapshot):
        runner = CliRunner()
        assert runner.invoke(cli, ["download", "--verify", str(directory)]).exit_code == 0
        with (directory / "model-2.safetensors").open("r+b") as file:
            file.seek(500)
            file.write(b"\0\1\2")
        (directory / "config.json").resolve().unlink()
        found = runner.invoke(cli, ["download", "--verify", str(directory)])
        assert found.exit_code == 1
        assert "model-2.safetensors: has another content" in found.output
        assert "config.json: is missing" in found.output
        (command,) = re.findall("again with: millrace (.*)", found.stderr)
        mended = runner.invoke(cli, [*shlex.split(command), "--endpoint", server.url])
        assert mended.exit_code == 0, mended.output
        assert_whole(directory)


def test_a_changed_file_comes_again(server: FakeHub, tmp_path: Path) -> None:
    fetch(server, tmp_path)
    (tmp_path / "out" / destination.STATE_FOLDER / "manifest.json").unlink()
    (tmp_path / "out" / "config.json").write_bytes(b"[]" + b" " * (len(FILES["config.json"]) - 2))
    before = dict(server.sent)
    assert_whole(fetch(server, tmp_path))
    assert {name for name in before if server.sent[name] != before[name]} == {"config.json"}


def test_two_at_once_fetch_everything_once(server: FakeHub, tmp_path: Path) -> None:
    server.faults = Faults(rate=2_000_000)
    command = [sys.executable, "-m", "millrace", "download", MODEL, "--endpoint", server.url]
    command += ["--local-dir", str(tmp_path / "out")]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate(timeout=60)[0] for one in runs] == [f"{tmp_path / 'out'}\n"] * 2
    assert_whole(tmp_path / "out")
    assert server.sent == {name: len(FILES[name]) for name in WANTED if FILES[name]}


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.sweep)])
def test_each_kill_costs_less_than_a_chunk(tmp_path: Path, kills: int) -> None:
    size = kills * 4 << 20
    with fake_hub({"config.json": b"{}", "model.safetensors": large_file(size)}) as server:
        server.faults = Faults(rate=20_000_000)
        assert killed_until_done(server, tmp_path / "out", kills) >= kills - 1
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == large_file(size)
        # Bytes in the sockets' buffers when a process dies were sent and never seen.
        extra = server.sent["model.safetensors"] - size
        assert extra <= kills * CHUNK
