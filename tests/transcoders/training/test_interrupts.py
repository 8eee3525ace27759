"""Requests to end: raised at once, or held back to the end of a block."""

import signal
import threading

import pytest

from scfm_circuits.transcoders.training.interrupts import Terminated, stops_heeded

NUMBERS = (signal.SIGINT, signal.SIGTERM)
RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    before = [signal.getsignal(number) for number in NUMBERS]
    yield
    assert [signal.getsignal(number) for number in NUMBERS] == before


@pytest.mark.parametrize("number", NUMBERS)
def test_a_request_is_raised_at_once(number):
    done = []
    with pytest.raises(RAISED[number]), stops_heeded():
        signal.raise_signal(number)
        done.append(1)
    assert not done


def test_termination_tells_the_shell_its_signal():
    with pytest.raises(SystemExit) as caught, stops_heeded():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + 15


@pytest.mark.parametrize("number", NUMBERS)
def test_a_held_request_waits_for_the_outermost_block(number):
    done = []
    with pytest.raises(RAISED[number]), stops_heeded() as stops:
        with stops.held():
            with stops.held():
                signal.raise_signal(number)
                done.append(1)
            signal.raise_signal(number)
            done.append(2)
        done.append(3)
    assert done == [1, 2]


def test_an_error_in_a_held_block_goes_first():
    with pytest.raises(ZeroDivisionError), stops_heeded() as stops, stops.held():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError


def test_a_request_is_raised_once():
    with stops_heeded() as stops:
        with pytest.raises(Terminated), stops.held():
            signal.raise_signal(signal.SIGTERM)
        with stops.held():
            pass
        assert stops.asked is None


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with stops_heeded():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_has_nothing_to_heed():
    found: list[object] = []

    def work() -> None:
        with stops_heeded() as stops, stops.held():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
