"""Several processes of one command: each one sees that another one hangs or is gone, and one of them says so.

Every process writes a number to the store that the processes share (``torch.distributed.Store``), and adds one every
few seconds. A process whose number stays the same, because it was stopped, its machine is gone or it waits for a disk,
is lost: the others end with one message, instead of waiting in a collective operation. Where torchrun or SLURM started
them, these may start them again. A process that ends writes a word instead of its number. Without torchrun the store is
in the first process, which therefore ends last: otherwise the others would take its end for a failure.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lora_one.progress import first_of_node, first_process

BEAT_S = 2.0  # seconds between two signs of life, at most
ENDED, FAILED = "ended", "failed"
EXIT_CODE = 1
LAST_CALL_S = 10.0  # seconds for a call of the store at the end
CONNECTION = ("gloo", "nccl", "closed by peer", "reset by peer", "tcpstore")  # in the text of an error
CONTINUES = "all processes end; the same command continues from the last resume point"


class Peers:
    """The processes of one command, as one of them sees them.

    store: shared by all; this object's threads alone use this connection (``Store.clone``).
    silence_s: seconds without a sign of life after which a process is lost. They are counted by this process itself, so
    time in which it was stopped too, such as that of a sleeping laptop, does not count.
    end: ends this process at once, from any thread.
    """

    def __init__(self, store: Any, rank: int, count: int, silence_s: float, end: Callable[[int], object] = os._exit):
        self.store, self.rank, self.count, self.silence_s, self.end = store, rank, count, silence_s, end
        self.beat_s = min(BEAT_S, silence_s / 8)
        self.ticks = self.answered = 0  # beats of this process's clock; those when the store answered last
        self.reports = self.reports_without_store = 0
        self.reporting = False  # the main thread reports that a process is lost
        self.word: str | None = None  # the last sign of life
        self.word_of_first: str | None = None  # that of the process with the store
        self.found: dict[int, tuple[bytes, int]] = {}  # rank -> what it wrote last, and the tick when that was new
        self.lock, self.ending = threading.Lock(), threading.Event()
        store.set(f"name/{rank}", f"pid {os.getpid()} on {socket.gethostname()}")

    def beat(self) -> None:
        """Write a sign of life."""
        self.store.set(f"life/{self.rank}", self.word or str(self.ticks))

    def look(self) -> None:
        """Read the signs of life of the other processes."""
        keys = {rank: f"life/{rank}" for rank in range(self.count) if rank != self.rank}
        known = [rank for rank, key in keys.items() if rank in self.found or self.store.check([key])]
        words = self.store.multi_get([keys[rank] for rank in known]) if known else []
        for rank, word in zip(known, words, strict=True):
            if self.found.get(rank, (None,))[0] != word:
                self.found[rank] = (word, self.ticks)

    def silent(self, seconds: float) -> list[int]:
        """Return the ranks without a new sign of life for so long; not those that have ended as they should."""
        return [
            rank
            for rank, (word, since) in self.found.items()
            if word.decode() != ENDED and (self.ticks - since) * self.beat_s > seconds
        ]

    def reported(self, rank: int) -> bool:
        """Return whether a process has said that it ends after an error, which it has reported."""
        return self.found[rank][0].decode() == FAILED

    def claim(self) -> bool:
        """Return whether this process reports the next error: the first one that asks does.

        All processes have the same errors in the same order, or one has an error and all end. If the store is gone with
        its process, the first process that is left reports.
        """
        self.reports += 1
        try:
            return self.store.add(f"reported/{self.reports}", 1) == 1
        except RuntimeError:
            self.reports_without_store += 1  # two threads may ask
            return self.word_of_first is None and self.first_left() and self.reports_without_store == 1

    def lost(self, ranks: list[int], seconds: float) -> str:
        """Return the message about lost processes."""
        names = [f"{rank} ({self.store.get(f'name/{rank}').decode()})" for rank in ranks[:4]]
        names += [f"{len(ranks) - 4} more"] if len(ranks) > 4 else []
        which = f"process {names[0]}" if len(ranks) == 1 else f"processes {', '.join(names[:-1])} and {names[-1]}"
        return (
            f"{which} of {self.count} gave no sign of life for {seconds:.0f} s (killed, stopped, or the machine is "
            f"gone): {CONTINUES}"
        )

    def count_time(self) -> None:
        """Count ticks; end this process if the store does not answer. In a thread, as every call of the store waits."""
        while self.word is None:
            self.pause(self.beat_s)
            self.ticks += 1
            if self.word_of_first == ENDED:  # and with it, as it should, the store
                return
            if (self.ticks - self.answered) * self.beat_s > self.silence_s:
                return self.leave(self.store_gone(), asking=False)

    def watch(self) -> None:
        """Give and read signs of life until this process ends, or another one is lost; then end it. In a thread.

        The others are read four times in ``silence_s``, which costs little with many processes.
        """
        every, rounds = max(1, int(self.silence_s / 4 / self.beat_s)), 0
        while self.word is None:
            self.pause(self.beat_s)
            try:
                with self.lock:
                    self.beat()
                    self.hear_first()
                    rounds += 1
                    if rounds % every == 0:
                        self.look()
                        self.answered = self.ticks
                    gone = self.silent(self.silence_s)
                    known = self.reporting or any(map(self.reported, gone))
                    message = None if known or not gone else self.lost(gone, self.silence_s)
            except RuntimeError:
                return self.after_the_store()
            if gone:
                return self.leave(message)

    def pause(self, seconds: float) -> None:
        """Wait, but not after the farewell of this process."""
        self.ending.wait(seconds)

    def hear_first(self) -> None:
        """Read whether the process with the store ends, and tell it that this one knows."""
        if self.rank > 0 and self.word_of_first is None and self.store.check(["over"]):
            self.word_of_first = self.store.get("over").decode()
            self.store.set(f"heard/{self.rank}", "")

    def after_the_store(self) -> None:
        """End this process, as the one with the store is gone; unless that has ended as it should."""
        if self.word_of_first is None:
            return self.leave(self.store_gone())
        if self.word_of_first == FAILED:
            self.pause(3 * self.beat_s)  # this process may have the same error or signal
            self.leave(None)

    def first_left(self) -> bool:
        """Return whether this is the first process that is left when the one with the store is gone."""
        return self.rank == (0 if store_of_torchrun() else 1)

    def store_gone(self) -> str:
        """Return the message about the process that has the store."""
        where = "torchrun on the first machine" if store_of_torchrun() else "process 0"
        return f"{where}, which connects the processes, does not answer: {CONTINUES}"

    def leave(self, message: str | None, *, asking: bool = True) -> None:
        """Report a message, unless another process does, and end this process.

        asking: ask the store who reports; otherwise the first process that is left does.
        """
        if self.word is None:  # else it is ending
            if message is not None and (self.claim() if asking else self.first_left()):
                print_line(message)
            elif asking:
                self.pause(self.beat_s)  # the main thread may be reporting
                if self.word is not None:
                    return
            if asking:
                self.farewell(FAILED)
            self.end(EXIT_CODE)

    def after_lost_connection(self, error: Exception) -> str:
        """Wait until a process that is gone can be told from those that are left; return a message that names it.

        If none is gone, the message has the first line of the error, which may have another cause: two processes on
        one GPU, or a network interface that is missing.
        """
        self.reporting, soon = True, 3 * self.beat_s
        try:
            until = self.ticks + 5
            while self.ticks < until and not self.store.check([f"reported/{self.reports + 1}"]):
                with self.lock:
                    self.look()
                self.pause(self.beat_s / 2)
            gone = self.silent(soon)
            if gone:
                return self.lost(gone, soon)
        except RuntimeError:
            return self.store_gone()
        reason = " ".join(str(error).split())[:300]
        return f"the connection to another process is lost ({reason}): {CONTINUES}"

    def farewell(self, word: str) -> None:
        """Write the last sign of life: ENDED, or FAILED, after which the others end too, but not at once.

        They may have the same error or signal, and still be writing the status of the run.
        """
        if self.word is None:
            self.word = word
            self.ending.set()
            try:
                with self.lock:
                    self.beat()
                    if self.rank == 0 and not store_of_torchrun():
                        self.end_last(word)
            except RuntimeError:  # the process with the store has ended before
                pass

    def end_last(self, word: str) -> None:
        """Wait until the other processes have ended, know that this one ends (then for three beats), or are lost."""
        self.store.set("over", word)
        pauses = 8  # in a beat
        for pause in range(int(pauses * self.silence_s / self.beat_s)):
            self.look()
            ended = {rank for rank, (word, _) in self.found.items() if word.decode() in (ENDED, FAILED)}
            left = self.found.keys() - ended - set(self.silent(3 * self.beat_s))
            if not left or (pause > 3 * pauses and self.store.check([f"heard/{rank}" for rank in left])):
                return
            time.sleep(self.beat_s / pauses)
            self.ticks += 1 / pauses


def store_of_torchrun() -> bool:
    """Return whether torchrun's agent, and not the first process, has the store."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_peers: list[Peers] = []  # of this process: none or one


def meet_peers(store: Any, rank: int, count: int, silence_s: float) -> None:
    """Begin to give and to read signs of life, in threads of their own. Arguments: see ``Peers``."""
    peers = Peers(store, rank, count, silence_s)
    peers.beat()  # one that is killed before the first beat of the thread is named, too
    _peers[:] = [peers]
    threads = [threading.Thread(target=work, daemon=True) for work in (peers.count_time, peers.watch)]
    atexit.register(end_with, peers, threads)
    for thread in threads:
        thread.start()


def end_with(peers: Peers, threads: Sequence[threading.Thread]) -> None:
    """Say farewell, and wait for the threads: Python aborts a process that ends during a thread's call of the store."""
    peers.farewell(ENDED)
    for thread in threads:
        thread.join(LAST_CALL_S)


def print_error(message: str) -> None:
    """Print an error on one line of stderr; of several processes, the first that has it prints.

    Before they have met, the first one of each machine prints: a file may be missing on one machine alone.
    """
    if _peers:
        if _peers[0].claim():
            print_line(message)
    elif first_process():
        print_line(message)
    elif first_of_node():
        print_line(f"on {socket.gethostname()}: {message}")


def print_line(message: str) -> None:
    """Print an error on one line of stderr."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def failed() -> None:
    """Tell the other processes that this one ends after an error or a signal, which it has reported."""
    for peers in _peers:
        peers.farewell(FAILED)


def lost_connection(error: Exception) -> str | None:
    """Return the message about an error in the communication with another process; None: it is another error."""
    return _peers[0].after_lost_connection(error) if of_connection(error) else None


def of_connection(error: Exception) -> bool:
    """Return whether an error is one in the communication with another process."""
    text = f"{type(error).__name__} {error}".lower()
    return bool(_peers) and isinstance(error, RuntimeError) and any(sign in text for sign in CONNECTION)
