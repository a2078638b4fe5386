"""Work in a thread of its own, so that Ctrl-C is heard while C++ code compiles or computes."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")

_workers: list[threading.Thread] = []


class _Done(NamedTuple):
    error: BaseException | None


def background(
    work: Callable[[], Iterable[T]], *, newest: bool = False
) -> Generator[T, None, None]:
    """Yields what `work()` yields; an error in there is raised here.

    When the consumer stops early (Ctrl-C), the worker ends after the item at hand, and work that is
    begun later waits for it.

    Args:
      newest: skip to the latest item when the consumer is slower than the worker.
    """
    box: queue.SimpleQueue[T | _Done] = queue.SimpleQueue()
    stopped = threading.Event()
    earlier = [worker for worker in _workers if worker.is_alive()]

    def run() -> None:
        for worker in earlier:
            worker.join()
        try:
            for item in work():
                box.put(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            box.put(_Done(error))
        else:
            box.put(_Done(None))

    worker = threading.Thread(target=run, daemon=True)
    _workers[:] = [*earlier, worker]
    worker.start()
    try:
        while True:
            item = box.get()
            while newest and not isinstance(item, _Done) and not box.empty():
                later = box.get()
                if isinstance(later, _Done):
                    yield item  # the last one is always seen
                item = later
            if isinstance(item, _Done):
                worker.join()
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stopped.set()


def busy() -> bool:
    """Whether a worker is still at an item that nobody waits for."""
    return any(worker.is_alive() for worker in _workers)
