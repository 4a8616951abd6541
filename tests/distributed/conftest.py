"""Ranks that all distributed tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that share ranks stay in one worker of pytest-xdist, so that no others are started beside them."""
    for item in items if config.pluginmanager.hasplugin("xdist") else []:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(2).run(function, argument=...)`: `function(world, argument=...)` on two ranks, started once a session."""
    started: dict[int, Ranks] = {}

    def of_size(size: int) -> Ranks:
        for other in [known for known in started if known != size]:
            started.pop(other).close()  # idle ranks would only take memory
        return started.setdefault(size, Ranks(size))

    yield of_size
    for each in started.values():
        each.close()
