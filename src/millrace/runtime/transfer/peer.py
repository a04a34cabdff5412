"""One engine among others: what it offers, and what it takes."""

from __future__ import annotations

import logging
import uuid
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from millrace.protocol import RecordMove
from millrace.runtime.transfer.client import RecordClient
from millrace.runtime.transfer.identity import Identity
from millrace.runtime.transfer.layout import RecordLayout
from millrace.runtime.transfer.messages import Hello
from millrace.runtime.transfer.offers import Moved, Offers
from millrace.runtime.transfer.server import RecordServer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """By which others take this engine's records."""

    engine: str
    host: str
    port: int


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
    ) -> None:
        hello = Hello(uuid.uuid4().hex, identity, memory=memory.nbytes, address=memory.data_ptr())
        self._offers = Offers()
        self._server = RecordServer(hello, self._offers, layout, memory, descriptor, host, port)
        self._client = RecordClient(hello, layout, memory, kind)
        self.address = Address(hello.engine, host, self._server.port)
        logger.info("records of prompts are handed over at %s port %d", host, self.address.port)

    def send(self, move: RecordMove) -> Future[Moved]:
        """Let others take a record. The result: whether one did."""
        return self._offers.add(move)

    def receive(self, move: RecordMove) -> Future[Moved]:
        """Take a record of another. The result: whether it is here, whole."""
        return self._client.take(move)

    def expire(self) -> None:
        """Give up what nobody has taken in time."""
        self._offers.expire()

    def close(self) -> None:
        """End every connection; nothing that was offered can be taken any more."""
        self._client.close()
        self._server.close()
        self._offers.close()
