import os
import signal

import pytest

from runner.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_gives_the_exit_code(number, capsys):
    with Interrupt() as interrupt:
        interrupt.exit_if_requested()
        assert not interrupt.is_requested()
        os.kill(os.getpid(), number)
        assert interrupt.is_requested()
    with pytest.raises(SystemExit) as left:
        interrupt.exit_if_requested()
    assert left.value.code == 128 + number
    assert "the same command goes on" in capsys.readouterr().err


def test_the_second_signal_ends_it_at_once():
    # What a shell starts in the background ignores the signal from the beginning.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handlers_of_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
