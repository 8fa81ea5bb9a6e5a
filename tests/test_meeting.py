"""Workers that wait for each other, as threads of this process."""

import contextlib
import socket
import threading

import helpers
import pytest

from pipeline.command import InputError, UnreachableError
from trainer import meeting
from trainer.workers import Cluster

LATE = 0.2  # seconds


@pytest.fixture
def addresses():
    return [f"127.0.0.1:{port}" for port in helpers.free_ports(3)]


class Meeting:
    """Workers that were told to meet, and what became of each: None, or why it gave up."""

    def __init__(self, addresses):
        self.addresses = addresses
        self.ends = {}
        self.lines = {}
        self.threads = []

    def come(self, rank):
        def work():
            self.ends[rank] = None
            try:
                self.lines[rank] = meeting.meet(Cluster(self.addresses, rank))
            except InputError as error:
                self.ends[rank] = error

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def result(self):
        for thread in self.threads:
            thread.join(60)
        return self.ends


def guest(addresses):
    """A connection to the first worker, as soon as it listens."""
    host, port = addresses[0].split(":")
    while True:
        try:
            return socket.create_connection((host, int(port)), 60)
        except ConnectionRefusedError:
            threading.Event().wait(0.01)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_all_go_on_once_the_last_has_come(addresses, order, caplog):
    caplog.set_level("INFO", "digits_pipeline")
    met = Meeting(addresses)
    for rank in order[:2]:
        met.come(rank)
    met.threads[-1].join(LATE)
    assert all(thread.is_alive() for thread in met.threads)
    met.come(order[2])
    assert met.result() == {0: None, 1: None, 2: None}
    assert (
        f"worker 1: waiting for the other 2 of 3 workers: worker 0 ({addresses[0]}),"
        f" worker 2 ({addresses[2]})" in caplog.messages
    )


def heard(line):
    """Whether a stop is heard within a while."""
    return any(line.heard() or threading.Event().wait(0.01) for _ in range(20))


def test_what_one_of_all_is_told_the_first_hears_and_can_tell(addresses):
    met = Meeting(addresses)
    for rank in range(3):
        met.come(rank)
    met.result()
    lines = met.lines
    with socket.create_server(("", int(addresses[0].split(":")[1]))):  # as TensorFlow does next
        lines[1].tell()
        assert [heard(lines[rank]) for rank in range(3)] == [True, False, False]
        lines[0].tell()
        assert [heard(lines[rank]) for rank in range(3)] == [True, True, True]
    lines[1].close()
    lines[0].tell()  # though nobody is there
    assert lines[0].heard()


def test_an_end_is_no_stop(addresses):
    met = Meeting(addresses)
    for rank in range(3):
        met.come(rank)
    met.result()
    met.lines[1].close()
    assert [heard(met.lines[rank]) for rank in (0, 2)] == [False, False]
    met.lines[2].tell()
    assert heard(met.lines[0])


def test_what_is_told_together_with_the_meeting_is_heard(addresses):
    met = Meeting(addresses)
    with socket.create_server(("127.0.0.1", int(addresses[0].split(":")[1]))) as server:
        met.come(1)
        other, _ = server.accept()
        with other:
            other.sendall(meeting.ALL_HERE + meeting.STOP)
            assert met.result() == {1: None}
            assert met.lines[1].heard()


def test_who_has_gone_again_is_waited_for(addresses):
    met = Meeting(addresses)
    met.come(0)
    with guest(addresses) as gone:
        gone.sendall(b"digits worker 1\n")
    met.come(2)
    met.threads[0].join(LATE)
    assert all(thread.is_alive() for thread in met.threads)
    met.come(1)
    assert met.result() == {0: None, 1: None, 2: None}


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"digits worker 1", b"\0" * 1000])
def test_strangers_are_shown_out(addresses, said):
    met = Meeting(addresses)
    met.come(0)
    with guest(addresses) as stranger, guest(addresses):  # and one that says nothing
        stranger.sendall(said)
        with contextlib.suppress(ConnectionResetError):  # it was not read to its end
            assert stranger.recv(1) == b""
        met.come(1)
        met.come(2)
        assert met.result() == {0: None, 1: None, 2: None}


def test_who_waits_in_vain_hears_who_is_missing(addresses, monkeypatch):
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 3.0)
    met = Meeting(addresses)
    met.come(0)
    met.come(1)
    ends = met.result()
    assert [type(ends[rank]) for rank in (0, 1)] == [UnreachableError] * 2
    said = f"worker 2 ({addresses[2]}) did not come within 3 s"
    assert [str(ends[rank]) for rank in (0, 1)] == [said] * 2


def test_a_server_of_another_kind_is_no_first_worker(addresses, monkeypatch):
    """As of TensorFlow, where the first worker has met all of them already."""
    monkeypatch.setattr(meeting, "MEETING_SECONDS", 1.0)
    met = Meeting(addresses)
    with socket.create_server(("127.0.0.1", int(addresses[0].split(":")[1]))) as server:
        met.come(1)
        other, _ = server.accept()
        other.sendall(b"\0\0\0\4\0\0\0\0\0")
        other.close()
        ends = met.result()
    assert str(ends[1]) == f"worker 0 ({addresses[0]}) did not answer within 1 s"


def test_an_address_that_is_taken_is_told_in_one_line(addresses):
    with socket.create_server(("", int(addresses[0].split(":")[1]))):
        line = f"^worker 0 cannot listen at {addresses[0]}: Address already in use$"
        with pytest.raises(InputError, match=line):
            meeting.meet(Cluster(addresses, 0))
