"""Runs several functions in lockstep: they wait for each other at named points, where their values are combined.

To fit a layer to a whole calibration set, with all earlier layers fitted already, one needs either one pass per layer
or one batch with all images. Runs in lockstep need one pass, and keep only the live values of each batch in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import torch

from fxprune.errors import ModelError

Rendezvous = Callable[[Hashable, Any], Any]
"""``meet(point, value) -> answer``: waits until every unfinished run has reached the point."""


def run_lockstep(
    runs: Mapping[Any, Callable[[Rendezvous], None]], decide: Callable[[Any, dict[Any, Any]], Mapping[Any, Any]]
) -> None:
    """Run functions in turn, one at a time, each up to its next point.

    Parameters
    ----------
    runs : mapping
        Functions by name; each is called with a `Rendezvous`. Each runs in its own thread, without gradients.
    decide : callable
        ``(point, values by name) -> answers by name``: called when all unfinished runs have reached a point. A run
        without an answer gets None.

    Raises
    ------
    ModelError
        If runs wait at different points.
    Exception
        The error of a function or of `decide`. The other runs are stopped first.

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
                        "batches take different paths through the model: some are at"
                        f" {', '.join(sorted(map(str, points)))}; give calibration batches of one size"
                    )
                for point in points:
                    answers = decide(point, {name: met[name][1] for name in workers})
        finally:
            for worker in workers.values():
                worker.stop()


class _Stopped(BaseException):
    """Ends a run after another run has failed."""


class _Worker:
    """A function in a thread. It runs only while the main thread waits in `resume`."""

    def __init__(self, pool: ThreadPoolExecutor, run: Callable[[Rendezvous], None]) -> None:
        self.inbox: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self.outbox: SimpleQueue[tuple[Any, Any] | Future[None]] = SimpleQueue()
        pool.submit(self._work, run).add_done_callback(self.outbox.put)

    def resume(self, answer: Any) -> Any:
        """Run to the next point; return the point and the value, or None if the function has returned."""
        self.inbox.put((True, answer))
        met = self.outbox.get()
        return met.result() if isinstance(met, Future) else met

    def stop(self) -> None:
        """End the function at the point where it waits."""
        self.inbox.put((False, None))

    @torch.no_grad()
    def _work(self, run: Callable[[Rendezvous], None]) -> None:
        self._wait()
        run(self._meet)

    def _meet(self, point: Hashable, value: Any) -> Any:
        self.outbox.put((point, value))
        return self._wait()

    def _wait(self) -> Any:
        resumed, answer = self.inbox.get()
        if not resumed:
            raise _Stopped
        return answer
