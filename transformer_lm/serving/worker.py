"""The thread in which a scheduler works, and how the event loop speaks with it."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator

from absl import logging

from transformer_lm.errors import UserError, one_line
from transformer_lm.generation.scheduler import Job, Part, Request, Scheduler

ENDED = "The server writes no more texts."


class BusyError(Exception):
    """There are as many texts at work and waiting as there may be."""


class WorkerError(Exception):
    """The work on a text failed, by no fault of who asked for it."""


class Texts:
    """Texts that one client waits for; made by `Worker.submit`, used in its event loop alone."""

    def __init__(self, worker: "Worker", requests: list[Request]):
        self.requests, self.unfinished = requests, len(requests)
        self._worker = worker
        self._news: asyncio.Queue[tuple[int, Part] | WorkerError] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """(Number of the text, what is new of it), until all are finished; raises WorkerError if the work failed."""
        left = len(self.requests)
        while left:
            news = await self._news.get()
            if isinstance(news, WorkerError):
                raise news
            left -= bool(news[1].finish_reason)
            yield news

    def close(self):
        """Frees what unfinished texts hold: the client has gone, or has all."""
        if self.unfinished:
            self._worker.open -= self.unfinished
            self.unfinished = 0
            self._worker.inbox.put((self, "close"))

    def deliver(self, news: tuple[int, Part] | WorkerError):
        """Called in the event loop."""
        if not self.unfinished:
            return
        finished = self.unfinished if isinstance(news, WorkerError) else bool(news[1].finish_reason)
        self.unfinished -= finished
        self._worker.open -= finished
        self._news.put_nowait(news)


class Worker:
    """Works on texts in a thread of its own.

    Attributes:
      limit: how many texts may be at work and waiting together.
      open: how many are.
    """

    def __init__(self, scheduler: Scheduler, limit: int):
        self.scheduler, self.limit, self.open = scheduler, limit, 0
        self.inbox: queue.SimpleQueue[tuple[Texts | None, str]] = queue.SimpleQueue()
        self._jobs: dict[Job, tuple[Texts, int]] = {}
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    def submit(self, requests: list[Request]) -> Texts:
        """Takes requests; call it in the event loop.

        Raises:
          UserError: one does not fit into the context.
          BusyError: there are too many texts already.
          WorkerError: the thread has ended.
        """
        for request in requests:
            self.scheduler.engine.check(request.prompt, request.max_tokens, request.settings)
        self.check_room(len(requests))
        self.open += len(requests)
        texts = Texts(self, requests)
        self.inbox.put((texts, "open"))
        if self._has_ended:  # perhaps before it could find them in the inbox
            texts.close()
            raise WorkerError(ENDED)
        return texts

    def check_room(self, count: int):
        """Raises UserError for more texts than there may ever be at once, BusyError for more than there may be now."""
        if count > self.limit:
            raise UserError(f"{count} texts at once are too many: this server takes {self.limit}.")
        if self.open + count > self.limit:
            raise BusyError(f"{self.open} texts are at work or waiting, and {self.limit} may be; try again later.")

    def stop(self):
        """Ends the thread after its present step."""
        self.inbox.put((None, "stop"))
        self._thread.join()

    def _run(self):
        try:
            self._work()
        except Exception as error:  # not even room for empty slots is left, say
            logging.error("The server writes no more texts, begin it again: %s", one_line(error))
        self._has_ended = True
        self._tell_all(ENDED)
        while not self.inbox.empty():
            texts, what = self.inbox.get()
            if what == "open":
                _tell([(texts, WorkerError(ENDED))])

    def _work(self):
        while self._read_inbox():
            try:
                parts = self.scheduler.advance()
            except Exception as error:  # memory is exhausted, say: all texts are lost, but not the server
                logging.error("Writing texts failed: %s", one_line(error))
                self._tell_all(one_line(error))
                self.scheduler.clear()
                continue
            owners = [self._jobs.pop(job) if part.finish_reason else self._jobs[job] for job, part in parts]
            _tell([(texts, (number, part)) for (texts, number), (_, part) in zip(owners, parts, strict=True)])

    def _read_inbox(self) -> bool:
        """Takes what has come, waiting while there is nothing else to do; False when it is time to stop."""
        while self.scheduler.is_idle or not self.inbox.empty():
            texts, what = self.inbox.get()
            if texts is None:
                return False
            if what == "open":
                for number, request in enumerate(texts.requests):
                    self._jobs[self.scheduler.submit(request)] = texts, number
            else:
                for job in [job for job, (owner, _) in self._jobs.items() if owner is texts]:
                    self.scheduler.cancel(job)
                    del self._jobs[job]
        return True

    def _tell_all(self, why: str):
        """Tells everybody whose texts are at work that they are lost."""
        owners = {id(texts): texts for texts, _ in self._jobs.values()}
        self._jobs = {}
        _tell([(texts, WorkerError(why)) for texts in owners.values()])


def _tell(news: list[tuple[Texts, tuple[int, Part] | WorkerError]]):
    """Hands news over to the event loop, all at once."""
    if not news:
        return

    def deliver():
        for texts, one in news:
            texts.deliver(one)

    try:
        news[0][0]._loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop is closed: nobody waits any more
        logging.debug("News came after the server's end.")
