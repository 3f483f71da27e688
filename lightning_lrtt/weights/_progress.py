"""A progress bar in bytes, of the kind that the Trainer uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(kind: str | None, total: int, text: str) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` bytes were loaded.

    Args:
        kind: ``rich``, ``tqdm``, or None for none.
        total: Bytes in all.
        text: What is loaded.

    Yields:
        A function that adds bytes.
    """
    if kind == "rich":
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns) as bar:
            task = bar.add_task(text, total=total)
            yield lambda count: bar.advance(task, count)
    elif kind == "tqdm":
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=text, unit="B", unit_scale=True) as bar:
            yield lambda count: bar.update(count) and None
    else:
        yield lambda count: None
