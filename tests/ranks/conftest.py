from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import Pool


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> Pool:
    """Pools of two and of four ranks."""
    return request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[request.param])
