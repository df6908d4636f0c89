from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.support.processes import Pool


def pool_of(count: int) -> Any:
    @pytest.fixture(scope="session")
    def pool() -> Iterator[Pool]:
        with closing(Pool(count)) as ranks:
            yield ranks

    return pool


two_ranks, four_ranks = pool_of(2), pool_of(4)


@pytest.fixture(params=["two_ranks", pytest.param("four_ranks", marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> Pool:
    """Pools of two and of four ranks."""
    return request.getfixturevalue(request.param)
