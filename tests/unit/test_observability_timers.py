"""Timers add up, nest, survive exceptions and wait for the device."""

import pytest

from nested_reft_mcore.observability.timers import Timers


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_nested_and_repeated_phases():
    clock = FakeClock()
    timers = Timers(clock=clock)
    with timers("step"):
        clock.sleep(1)
        for seconds in (2, 3):
            with timers("gen"):
                clock.sleep(seconds)
    assert timers.collect() == {"timing_s/gen": 5.0, "timing_s/step": 6.0}
    assert timers.collect() == {}


def test_running_phase_is_not_collected_before_it_ends():
    clock = FakeClock()
    timers = Timers(clock=clock)
    with timers("step"):
        with timers("gen"):
            clock.sleep(2)
        assert timers.collect() == {"timing_s/gen": 2.0}
        clock.sleep(1)
    assert timers.collect() == {"timing_s/step": 3.0}


def test_exception_passes_and_its_time_counts():
    clock = FakeClock()
    timers = Timers(clock=clock)

    def failing() -> None:
        with timers("gen"):
            clock.sleep(4)
            raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        failing()
    assert timers.collect() == {"timing_s/gen": 4.0}
    with timers("gen"):
        clock.sleep(1)
    assert timers.collect() == {"timing_s/gen": 1.0}


def test_same_phase_inside_itself_is_refused():
    timers = Timers()
    with timers("gen"), pytest.raises(ValueError, match="'gen' is already running"), timers("gen"):
        pass


def test_unfinished_device_work_is_charged_to_the_phase_that_started_it():
    clock = FakeClock()
    pending = [0.0]

    def synchronize() -> None:
        clock.sleep(pending[0])
        pending[0] = 0.0

    timers = Timers(synchronize, clock)
    pending[0] = 10.0  # left over by somebody else
    with timers("gen"):
        clock.sleep(1)
        pending[0] = 5.0
    assert timers.collect() == {"timing_s/gen": 6.0}
