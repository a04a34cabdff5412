"""A small insurer, with a store of hashed word pieces: no package with a model is needed."""

from __future__ import annotations

import pytest

from examples.insurance.build import entries
from examples.insurance.documents.insurer import Insurer, draw_insurer
from examples.insurance.documents.writing import write_all
from examples.insurance.retrieval.access import Access
from examples.insurance.retrieval.chunks import all_chunks
from examples.insurance.retrieval.embeddings import WordPieces
from examples.insurance.retrieval.glossary import Glossary
from examples.insurance.retrieval.search import Search
from examples.insurance.retrieval.store import Store


@pytest.fixture(scope="session")
def insurer() -> Insurer:
    return draw_insurer(60)


@pytest.fixture(scope="session")
def store(insurer: Insurer) -> Store:
    return Store.build(all_chunks(write_all(insurer)), WordPieces())


@pytest.fixture(scope="session")
def glossary(tmp_path_factory: pytest.TempPathFactory) -> Glossary:
    return Glossary.open(entries(), WordPieces(), tmp_path_factory.mktemp("glossary"))


@pytest.fixture(scope="session")
def search(insurer: Insurer, store: Store, glossary: Glossary) -> Search:
    forms = {p.number: p.form for p in insurer.policies}
    return Search(store, Access(store.chunks, forms), glossary)
