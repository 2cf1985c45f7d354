"""Several runs that wait for each other at named points: what is fitted there sees all of them, and all go on with it.

A statistic over a whole calibration set at some layer, with all layers before it corrected already, needs either one
pass a layer or one batch that holds everything. Runs in step need one pass, and hold of every batch what is alive at
one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch

from fxprune.errors import ModelError

Rendezvous = Callable[[Hashable, Any], Any]
"""``meet(point, value) -> answer``: waits until every run that is under way has come to the point."""


def run_lockstep(
    runs: Mapping[Any, Callable[[Rendezvous], None]], decide: Callable[[Any, dict[Any, Any]], Mapping[Any, Any]]
) -> None:
    """Run functions in turn, one at a time, from one meeting to the next.

    Parameters
    ----------
    runs : mapping
        Functions by name; each gets `Rendezvous`. They run in threads of their own, without gradients.
    decide : callable
        ``(point, values by name) -> answers by name``: called when all that are under way have come to one point; who
        gets no answer gets None.

    Raises
    ------
    ModelError
        If runs wait at different points.
    Exception
        What a function or `decide` raised, the others being stopped.

    Examples
    --------
    >>> seen = []
    >>> def run(meet): seen.append(meet("middle", len(seen)))
    >>> run_lockstep({"a": run, "b": run}, lambda point, values: dict.fromkeys(values, sum(values.values())))
    >>> seen
    [0, 0]
    """
    answers: Mapping[Any, Any] = {}
    with ThreadPoolExecutor(max(1, len(runs))) as pool:
        workers: dict[Any, _Worker] = {}
        try:
            for name, run in runs.items():
                workers[name] = _Worker(pool, run)
            while workers:
                met = {name: worker.resume(answers.get(name)) for name, worker in workers.items()}
                workers = {name: worker for name, worker in workers.items() if met[name] is not None}
                points = {met[name][0] for name in workers}
                if len(points) > 1:
                    raise ModelError(
                        f"batches take different ways through the model: some are at"
                        f" {', '.join(sorted(map(str, points)))} while others are elsewhere;"
                        " give calibration batches of one size"
                    )
                for point in points:
                    answers = decide(point, {name: met[name][1] for name in workers})
        finally:
            for worker in workers.values():
                worker.stop()


class _Stopped(BaseException):
    """Ends a run that nobody waits for any more."""


class _Worker:
    """A function in a thread that runs only while `resume` waits for it."""

    def __init__(self, pool: ThreadPoolExecutor, run: Callable[[Rendezvous], None]) -> None:
        self.inbox: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self.outbox: SimpleQueue[tuple[Any, Any] | Future[None]] = SimpleQueue()
        pool.submit(self._work, run).add_done_callback(self.outbox.put)

    def resume(self, answer: Any) -> Any:
        """Let it run to its next meeting; returns point and value, or None if it is done."""
        self.inbox.put((True, answer))
        met = self.outbox.get()
        return met.result() if isinstance(met, Future) else met

    def stop(self) -> None:
        """Let it end where it waits."""
        self.inbox.put((False, None))

    @torch.no_grad()
    def _work(self, run: Callable[[Rendezvous], None]) -> None:
        self._wait()
        run(self._meet)

    def _meet(self, point: Hashable, value: Any) -> Any:
        self.outbox.put((point, value))
        return self._wait()

    def _wait(self) -> Any:
        goes_on, answer = self.inbox.get()
        if not goes_on:
            raise _Stopped
        return answer
