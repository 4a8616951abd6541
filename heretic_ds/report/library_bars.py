"""Progress bars of libraries: none is shown beside this package's own line, which counts what they count."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import huggingface_hub.utils
from transformers.utils import logging as transformers_logging

from heretic_ds import progress


@contextmanager
def counted_here() -> Iterator[None]:
    """While the context lasts, loops for which transformers would show a bar are work in hand; others show nothing."""
    huggingface_hub.utils.disable_progress_bars()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # read by a library that is imported where it is needed
    transformers_logging.disable_progress_bar()
    before = transformers_logging.set_tqdm_hook(_bar)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(before)


def _bar(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What transformers gets in the place of a bar."""
    return _Counter(*arguments, **options)


class _Counter(transformers_logging.EmptyTqdm):
    """Does what transformers asks of bars, which is to count, and shows nothing."""

    def __init__(self, *arguments: Any, total: float | None = None, desc: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if total is None and isinstance(self._iterator, Sized):
            total = len(self._iterator)
        self._open = ExitStack()
        self._work = self._open.enter_context(progress.work((desc or "").lower() or "transformers", total))

    def __iter__(self) -> Iterator[Any]:
        with self._open:
            for item in self._iterator or ():
                yield item
                self._work.advance()

    def update(self, count: float = 1) -> None:
        """So much more is done."""
        self._work.advance(count)

    def close(self) -> None:
        """It is done."""
        self._open.close()

    def __exit__(self, *_: object) -> None:
        self.close()
