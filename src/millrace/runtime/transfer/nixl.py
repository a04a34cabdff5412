"""NIXL reads another engine's memory without its help: by RDMA where there is, else by what UCX
finds.

What it reads comes into memory of its own first: a read whose time is up may still be writing, and
must not write where a record lies. Such memory is not used again.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millrace.errors import ConfigError
from millrace.runtime.transfer.messages import Hello

logger = logging.getLogger(__name__)

NAMES = ("nixl", "nixl_cu13", "nixl_cu12")
MOST_KNOWN = 64  # engines whose memory is known
LEAST_BYTES = 1 << 20
_POLL_SECONDS = 0.0002


@dataclass(slots=True)
class _Room:
    """Memory that reads come into, and its registration."""

    data: Tensor
    registered: Any


class NixlReader:
    """engine: this one's name, unlike all others. memory: uint8, which others may read. Raises
    ConfigError if NIXL is not installed."""

    def __init__(self, engine: str, memory: Tensor) -> None:
        api = _api()
        config = api.nixl_agent_config(
            backends=["UCX"], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        self._agent = api.nixl_agent(engine, config)
        self._memory = self._register(memory)
        self.agent: bytes = self._agent.get_agent_metadata()
        self._known: dict[bytes, str] = {}  # names of others, by what they say of themselves
        self._rooms: list[_Room] = []
        self._lost: list[_Room] = []  # a read may still be writing there
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, hello: Hello, places: list[tuple[int, int]], end: float) -> Iterator[Tensor]:
        """The bytes of some places of another's memory, in order: uint8, until the context is left.
        Raises OSError if they do not come before `end`."""
        size = sum(length for _, length in places)
        room = self._room(size)
        ended = False
        try:
            self._read(hello, places, room, end)
            ended = True
            yield room.data[:size]
        finally:
            with self._lock:
                (self._rooms if ended else self._lost).append(room)

    def close(self) -> None:
        """Others can read nothing any more."""
        with self._lock:
            for name in self._known.values():
                self._forget(name)
            self._known.clear()
            for room in self._rooms:
                self._agent.deregister_memory(room.registered)
            self._rooms.clear()
            self._agent.deregister_memory(self._memory)

    def _register(self, memory: Tensor) -> Any:
        return self._agent.register_memory([(memory.data_ptr(), memory.nbytes, 0, "")], "DRAM")

    def _room(self, size: int) -> _Room:
        with self._lock:
            room = self._rooms.pop() if self._rooms else None
            if room is not None and len(room.data) < size:
                self._agent.deregister_memory(room.registered)
                room = None
            if room is None:
                data = torch.empty(max(size, LEAST_BYTES), dtype=torch.uint8)
                room = _Room(data, self._register(data))
            return room

    def _read(self, hello: Hello, places: list[tuple[int, int]], room: _Room, end: float) -> None:
        here, at = [], room.data.data_ptr()
        for _, length in places:
            here.append((at, length, 0))
            at += length
        there = [(hello.address + first, length, 0) for first, length in places]
        if any(first + length > hello.memory for first, length in places):
            raise ConnectionAbortedError("the record lies outside of the other engine's memory")
        try:
            with self._lock:
                name = self._name_of(hello.agent)
            local, remote = (self._agent.get_xfer_descs(spans, "DRAM") for spans in (here, there))
            handle = self._agent.initialize_xfer("READ", local, remote, name)
            self._await(handle, end)
        except OSError:
            raise
        except Exception as error:  # each of NIXL's own classes
            with self._lock:
                if known := self._known.pop(hello.agent, None):
                    self._forget(known)
            raise ConnectionAbortedError(f"nixl: {error or type(error).__name__}") from error

    def _await(self, handle: Any, end: float) -> None:
        """Start a read, and wait until it has ended. Raises TimeoutError if it does not in time."""
        state = self._agent.transfer(handle)
        while state == "PROC" and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            state = self._agent.check_xfer_state(handle)
        handle.release()
        if state == "PROC":
            raise TimeoutError
        if state != "DONE":
            raise ConnectionAbortedError("nixl: the read has failed")

    def _name_of(self, agent: bytes) -> str:
        if agent not in self._known:
            if not agent:
                raise ConnectionAbortedError("the other engine has no NIXL; use --kv-transport tcp")
            while len(self._known) >= MOST_KNOWN:
                self._forget(self._known.pop(next(iter(self._known))))
            self._known[agent] = self._agent.add_remote_agent(agent)
        return self._known[agent]

    def _forget(self, name: str) -> None:
        try:
            self._agent.remove_remote_agent(name)
        except Exception as error:
            logger.debug("nixl: %s is forgotten: %s", name, error)


def _api() -> Any:
    for name in NAMES:
        try:
            return importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
    raise ConfigError("kv_transport nixl: not installed; pip install 'millrace[pd]', or use tcp")
