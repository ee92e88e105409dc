"""Signs of life between processes: who is lost, who says so, and when nobody may be called lost."""

import re
import socket
import threading

import pytest
from torch import distributed as dist

from lora_one import distributed, peers
from lora_one.errors import RunError
from lora_one.peers import FAILED, Peers


class Ended(Exception):
    pass


def end(code):
    raise Ended(code)


@pytest.fixture
def three():
    store = dist.HashStore()
    return [Peers(store, rank, 3, silence_s=8.0, end=end) for rank in range(3)]


def later(all_of_them, ticks, *, silent=()):
    """Let time pass: everybody counts it, and those who are not silent give and read signs of life."""
    for _ in range(ticks):
        for each in all_of_them:
            each.ticks += 1
            if each.rank not in silent:
                each.beat()
        for each in all_of_them:
            if each.rank not in silent:
                each.look()


def test_a_process_is_lost_after_the_time_out_and_not_before(three):
    later(three, 3)
    per_second = 1 / three[0].beat_s
    later(three, round(8 * per_second), silent={2})
    assert three[0].silent(8.0) == []
    later(three, 2, silent={2})
    assert three[0].silent(8.0) == three[1].silent(8.0) == [2]
    later(three, 1)
    assert three[0].silent(8.0) == [], "it was slow, not gone"


def test_a_process_that_has_not_begun_or_has_ended_is_not_lost(three):
    alone = Peers(dist.HashStore(), 0, 3, silence_s=8.0)
    later([alone], 100)
    assert alone.silent(8.0) == [], "the other two have not started yet"
    later(three, 2)
    three[1].farewell(peers.ENDED)
    later(three, 100, silent={1})
    assert three[0].silent(8.0) == []


def test_a_process_that_was_stopped_itself_calls_nobody_lost(three):
    """Its clock stood still, too: after SIGCONT it waits as long as everybody else."""
    later(three, 3)
    later(three[:2], 500)
    three[2].ticks += 1
    three[2].look()
    assert three[2].silent(8.0) == []


def test_one_process_reports_an_error_that_all_have(three):
    assert [each.claim() for each in (three[1], three[0], three[2])] == [True, False, False]
    assert [each.claim() for each in (three[2], three[0], three[1])] == [True, False, False], "the next error"


def test_the_message_names_process_and_machine(three):
    later(three, 1)
    text = three[0].lost([2], 300)
    assert re.match(r"process 2 \(pid \d+ on \S+\) of 3 gave no sign of life for 300 s", text)
    assert "the same command continues from the last resume point" in text
    many = [Peers(three[0].store, rank, 9, silence_s=8.0) for rank in range(9)]
    assert re.search(
        r"processes 1 \(.*\), 2 \(.*\), 3 \(.*\), 4 \(.*\) and 2 more of 9", many[0].lost([1, 2, 3, 4, 5, 6], 8)
    )


def test_a_failure_ends_the_others_without_a_second_message(three, capsys, monkeypatch):
    """Not at once: they may have the same error, and still be writing the status of the run."""
    monkeypatch.setattr(Peers, "pause", lambda *_: setattr(three[2], "ticks", three[2].ticks + 1))
    later(three, 1)
    three[1].farewell(FAILED)
    later(three, 1, silent={1})
    said = three[2].ticks
    with pytest.raises(Ended):
        three[2].watch()
    assert capsys.readouterr().err == ""
    assert 8.0 < (three[2].ticks - said) * three[2].beat_s < 12.0


def test_a_lost_process_ends_the_others_with_one_message(three, capsys, monkeypatch):
    later(three, 1)
    for each in three[:2]:
        monkeypatch.setattr(Peers, "pause", lambda *_, each=each: setattr(each, "ticks", each.ticks + 1))
        with pytest.raises(Ended):
            each.watch()
    assert capsys.readouterr().err.count("error: process") == 1


def test_the_process_with_the_store_ends_when_the_others_know(three, monkeypatch):
    """Without that, they would report its end as a second error. A process that is lost is not waited for."""
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        three[1].ticks += seconds
        three[1].beat()
        if sum(slept) > 2:
            three[1].hear_first()

    monkeypatch.setattr("time.sleep", sleep)
    later(three, 1)
    three[0].farewell(FAILED)  # process 2 is silent
    assert three[1].word_of_first == FAILED and 3.0 < sum(slept) < 4.0
    three[1].store = Gone()
    assert not three[1].claim(), "it knows that the error was reported"
    monkeypatch.setattr(Peers, "pause", lambda *_: None)
    with pytest.raises(Ended):
        three[1].watch()


def test_the_process_with_the_store_does_not_wait_for_those_that_have_ended(three, monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    later(three, 1)
    for each in (three[2], three[1], three[0]):
        each.farewell(peers.ENDED)
    assert slept == []


def test_a_process_may_still_be_ending_after_the_one_with_the_store(three, capsys, monkeypatch):
    """It has ended as it should: neither a message nor another exit code."""
    monkeypatch.setattr(Peers, "pause", lambda *_: None)
    later(three, 1)
    three[1].farewell(peers.ENDED)
    monkeypatch.setattr(three[0], "silent", lambda _: [2])
    three[0].farewell(peers.ENDED)
    three[2].hear_first()
    three[2].store = Gone()
    three[2].watch()
    assert capsys.readouterr().err == ""


class Gone:
    """A store whose process has ended."""

    def __getattr__(self, name):
        def call(*_):
            raise dist.DistNetworkError("Broken pipe")

        return call


@pytest.mark.parametrize(("agent", "reporter"), [("True", 0), ("False", 1)])
def test_without_the_store_the_first_process_that_is_left_reports(three, agent, reporter, capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    monkeypatch.setattr(Peers, "pause", lambda *_: None)
    for each in three:
        each.store = Gone()
        with pytest.raises(Ended):
            each.watch()
        said = capsys.readouterr().err
        assert bool(said) == (each.rank == reporter)
        if said:
            assert ("torchrun on the first machine" if agent == "True" else "process 0") in said


def test_a_store_that_does_not_answer_is_gone(three, capsys, monkeypatch):
    """Its calls wait for ever, so another thread counts the time."""
    monkeypatch.setattr(Peers, "pause", lambda *_: None)
    with pytest.raises(Ended):
        three[1].count_time()
    assert "process 0, which connects the processes, does not answer" in capsys.readouterr().err


def test_only_an_error_of_a_connection_is_about_another_process(three, monkeypatch):
    monkeypatch.setattr(Peers, "pause", lambda *_: [setattr(each, "ticks", each.ticks + 1) for each in three])
    error = RuntimeError("[gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]: Connection reset by peer")
    assert peers.lost_connection(error) is None, "a single process"
    monkeypatch.setattr(peers, "_peers", [three[0]])
    later(three, 1)
    assert peers.lost_connection(RuntimeError("CUDA out of memory")) is None
    assert peers.lost_connection(ValueError("gloo")) is None
    assert re.match(r"processes 1 .* and 2 .* of 3 gave no sign of life", peers.lost_connection(error))


def test_a_lost_connection_is_not_examined_again_after_a_report(three, monkeypatch):
    """The other processes lose theirs to those that have ended, one after the other."""
    monkeypatch.setattr(Peers, "pause", lambda *_: pytest.fail("it waited"))
    monkeypatch.setattr(peers, "_peers", [three[1]])
    later(three, 1)
    assert three[2].claim()
    message = peers.lost_connection(RuntimeError("[gloo] Connection closed by peer"))
    assert message is not None and not three[1].claim()


def test_two_threads_report_one_error_without_the_store(three):
    three[1].store = Gone()
    assert [three[1].claim(), three[1].claim()] == [True, False]


def test_no_thread_is_left_when_the_process_ends(monkeypatch):
    """Python aborts a process that ends while a daemon thread is in a call of torch's store."""
    registered = []
    monkeypatch.setattr(peers.atexit, "register", lambda function, *arguments: registered.append((function, arguments)))
    monkeypatch.setattr(peers, "_peers", [])
    before = set(threading.enumerate())
    store = dist.HashStore()
    peers.meet_peers(store, 0, 1, silence_s=300.0)
    assert store.check(["life/0"]), "it is known from its beginning, and named if it is killed at once"
    assert len(set(threading.enumerate()) - before) == 2
    for function, arguments in registered:
        function(*arguments)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize(
    ("rank", "local", "said"), [("0", "0", "error: wrong"), ("1", "1", ""), ("8", "0", "error: on node3: wrong")]
)
def test_before_they_meet_one_process_of_each_machine_reports(rank, local, said, capsys, monkeypatch):
    """A file may be missing on one machine alone, whose first process then ends."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr("socket.gethostname", lambda: "node3")
    peers.print_error("wrong")
    assert capsys.readouterr().err.strip() == said


@pytest.mark.parametrize("agent", [True, False])
def test_processes_that_do_not_start_are_an_error_and_named_where_known(agent, monkeypatch):
    """Known with the store of torchrun; otherwise it is in the first process, which waits for the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if agent:
        store = dist.TCPStore("127.0.0.1", port, is_master=True)
        store.set("started/2", "")
    names = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": str(agent)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "JOIN_S", 1.5)
    who = "process 1" if agent else "the others"
    with pytest.raises(RunError, match=rf"not all of the 3 processes .* within .* minutes: what {who} printed"):
        distributed.joined()


def test_an_error_of_nccl_while_all_processes_live_is_shown(three, monkeypatch):
    """It may be a wrong setting, which the same command would meet again."""
    monkeypatch.setattr(Peers, "pause", lambda *_: [setattr(each, "ticks", each.ticks + 1) for each in three])
    monkeypatch.setattr(peers, "_peers", [three[0]])
    monkeypatch.setattr(Peers, "silent", lambda *_: [])
    message = peers.lost_connection(RuntimeError("NCCL error: invalid usage\nDuplicate GPU detected : rank 0 and 1"))
    assert "lost (NCCL error: invalid usage Duplicate GPU detected : rank 0 and 1): " in message
