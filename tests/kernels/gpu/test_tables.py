"""Tables of choices: what is found, which one goes first, and what is no table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import ConfigError
from millrace.kernels import dispatch
from millrace.kernels.gpu import tables

DEVICE = "Some GPU 80GB"
WAYS = st.one_of(st.sampled_from(["cublas", "torch"]), st.tuples(st.integers(0, 9), st.integers()))
LINES = st.dictionaries(st.integers(1, 5000), WAYS, min_size=1).map(
    lambda lines: tuple(sorted(lines.items(), key=lambda line: line[0]))
)


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(tables.DIRECTORY, str(tmp_path))
    dispatch.forget()
    yield
    dispatch.forget()


@given(first=LINES, second=LINES, sizes=st.lists(st.integers(1, 6000), max_size=20))
def test_a_size_takes_the_first_line_that_reaches_it(
    first: tuple[tables.Line, ...], second: tuple[tables.Line, ...], sizes: list[int]
) -> None:
    tables.own_path(DEVICE).unlink(missing_ok=True)
    for shape, lines in (((8, 16), first), ((3, 4, 5), second)):
        tables.write(tables.own_path(DEVICE), {"device": DEVICE}, {"some": {shape: lines}})
    dispatch.forget()
    for size in sizes:
        for shape, lines in (((8, 16), first), ((3, 4, 5), second)):
            reaching = [way for most, way in lines if most >= size]
            assert tables.find("some", shape, size, DEVICE) == (reaching[0] if reaching else None)
    assert tables.find("other", (8, 16), 1, DEVICE) is None
    assert tables.find("some", (8, 17), 1, DEVICE) is None


def test_the_users_table_goes_before_the_one_that_ships() -> None:
    device = "NVIDIA H200"
    shipped = tables.table(device)["fp8_products"]
    shape, other = sorted(shipped)[:2]
    path = tables.own_path(device)
    tables.write(path, {"device": device}, {"fp8_products": {shape: ((9999, "cublas"),)}})
    dispatch.forget()
    assert tables.find("fp8_products", shape, 5000, device) == "cublas"
    assert tables.table(device)["fp8_products"][other] == shipped[other]
    assert json.loads(path.read_text())["device"] == device


@pytest.mark.parametrize(
    "text",
    [
        "no json", "[]", '{"some": {"8xa": []}}', '{"some": {"8x8": [[5]]}}', '{"some": [1]}',
        '{"some": {"8x8": [[9, "a"], [5, "b"]]}}', '{"some": {"8x8": [[9, 4]]}}',
    ],
)  # fmt: skip
def test_what_is_no_table_is_named(text: str) -> None:
    tables.own_path(DEVICE).write_text(text)
    with pytest.raises(
        ConfigError, match=r"Some_GPU_80GB\.json is no table.*millrace tune kernels"
    ):
        tables.table(DEVICE)


def test_a_way_of_other_numbers_is_refused() -> None:
    assert tables.numbers_of((1, 2), ("a", "b")) == (1, 2)
    for way in ("cublas", (1, 2, 3)):
        with pytest.raises(ConfigError, match="'a', 'b'"):
            tables.numbers_of(way, ("a", "b"))
