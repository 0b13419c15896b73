"""The first SIGTERM is a wish, the second an order."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ssljax.preemption import StopSignal

CHILD = """
import time
from ssljax.preemption import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60)
"""


def test_the_second_signal_ends_the_process_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline().startswith("SIGTERM: saving, then leaving; a second SIGTERM ends")
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()


def test_the_handler_of_before_comes_back(capsys):
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [1]


def test_other_threads_take_no_signals():
    found = []

    def inside():
        with StopSignal() as stop:
            found.append(stop.received)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]
