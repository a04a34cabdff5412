"""One engine among others: what it offers, and what it takes. Each of its ranks has a part."""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
from torch import Tensor

from millrace.protocol import RecordMove
from millrace.runtime.transfer.client import RecordClient
from millrace.runtime.transfer.device_memory import handle_of
from millrace.runtime.transfer.identity import Identity
from millrace.runtime.transfer.layout import RecordLayout
from millrace.runtime.transfer.messages import Hello
from millrace.runtime.transfer.nixl import NixlReader
from millrace.runtime.transfer.offers import Moved, Offers
from millrace.runtime.transfer.record_form import RecordForm
from millrace.runtime.transfer.server import RecordServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """By which others take this engine's records."""

    engine: str
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Place:
    """A rank of an engine. engine: its id; empty: a new one. form: how records are divided over
    ranks; None: it takes none of engines with other numbers of them."""

    rank: int = 0
    engine: str = ""
    form: RecordForm | None = None


class Peer:
    """See the module. memory: uint8, where records lie. descriptor: of the file that it is; -1:
    none. kind: how bytes come here, one of `client.KINDS`. host, port: where others connect."""

    def __init__(
        self,
        identity: Identity,
        layout: RecordLayout,
        memory: Tensor,
        descriptor: int,
        kind: str,
        host: str,
        port: int,
        place: Place = Place(),
    ) -> None:
        engine = place.engine or new_engine()
        self._reader = NixlReader(f"{engine}-{place.rank}", memory) if kind == "nixl" else None
        self._hello = Hello(
            engine,
            identity,
            memory=memory.nbytes,
            address=memory.data_ptr(),
            agent=self._reader.agent if self._reader else b"",
            handle=handle_of(memory) if memory.is_cuda else b"",
        )
        self._offers = Offers()
        self._server = RecordServer(
            self._hello, self._offers, layout, memory, descriptor, host, port, place.rank
        )
        self._client = RecordClient(
            self._hello, layout, memory, kind, self._reader, place.rank, place.form
        )
        self.address = Address(engine, host, self._server.port)
        logger.info("records of prompts are handed over at %s port %d", host, self.address.port)

    def set_ports(self, ports: tuple[int, ...]) -> None:
        """Where the ranks of this engine hand over their parts."""
        self._server.set_hello(msgspec.structs.replace(self._hello, ports=ports))

    def send(self, move: RecordMove) -> Future[Moved]:
        """Let others take a record. The result: whether one did."""
        return self._offers.add(move)

    def grow(self, move: RecordMove) -> None:
        """Let others take more of a record that they may take a part of, or nothing after all."""
        self._offers.grow(move)

    def receive(self, move: RecordMove) -> Future[Moved]:
        """Take a record of another. The result: whether it is here, whole."""
        return self._client.take(move)

    def expire(self) -> None:
        """Give up what nobody has taken in time."""
        self._offers.expire()

    def close(self) -> None:
        """End every connection; nothing that was offered can be taken any more."""
        self._client.close()
        self._offers.close()
        self._server.close()
        if self._reader is not None:
            self._reader.close()


def new_engine() -> str:
    """An id that no other engine has."""
    return uuid.uuid4().hex
