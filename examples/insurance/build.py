"""Makes the store of an insurer, or reads the one that is there."""

from __future__ import annotations

import time
from pathlib import Path

from examples.insurance.documents import phrases
from examples.insurance.documents.insurer import Insurer
from examples.insurance.documents.wording import TOPICS
from examples.insurance.documents.writing import write_all
from examples.insurance.retrieval.access import Access
from examples.insurance.retrieval.chunks import all_chunks
from examples.insurance.retrieval.embeddings import choose
from examples.insurance.retrieval.glossary import Entry, Glossary
from examples.insurance.retrieval.search import Search
from examples.insurance.retrieval.store import Store


def store_of(insurer: Insurer, folder: Path) -> Store:
    """Says which embedder it is, and how long a build took."""
    embedder = choose()
    chunks = all_chunks(write_all(insurer))
    store = Store.load(folder, embedder)
    if store is None or store.chunks != chunks:
        began = time.monotonic()
        print(f"store: {len(chunks)} chunks, vectors by {embedder.name} ...", flush=True)
        store = Store.build(chunks, embedder)
        store.save(folder)
        print(f"store: built in {time.monotonic() - began:.0f} s", flush=True)
    else:
        print(
            f"store: {len(chunks)} chunks, vectors by {embedder.name}, as built before", flush=True
        )
    return store


def entries() -> list[Entry]:
    """The insurer's glossary; phrases that are held out for tests are not in it."""
    return [
        Entry(topic.names, (*topic.asked[:-1], *phrases.known(name)))
        for name, topic in TOPICS.items()
    ]


def search_of(insurer: Insurer, store: Store, folder: Path) -> Search:
    """folder: of the store, where the glossary's vectors are kept too."""
    forms = {policy.number: policy.form for policy in insurer.policies}
    glossary = Glossary.open(entries(), store.embedder, folder)
    return Search(store, Access(store.chunks, forms), glossary)
