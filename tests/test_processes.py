"""Training over two processes on the loopback: the bits of one process, and an end when one of them dies."""

import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).with_name("processes.py")


def start(processes: int, path, steps: int) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(SCRIPT), coordinator, str(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(i), str(path), str(steps)], **pipes) for i in range(processes)]


@pytest.fixture
def cleanly():
    running: list[subprocess.Popen] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def test_two_processes_have_the_bits_of_one(tmp_path, cleanly):
    """The weights are equal; the loss is a sum over 8 devices, with 7 roundings in an order of its own."""
    weights, losses = [], []
    for processes in (1, 2):
        cleanly += start(processes, tmp_path / f"{processes}.npy", steps=3)
        for process in cleanly[-processes:]:
            out, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            losses.append([float(line.split()[1]) for line in out.splitlines() if line.startswith("loss ")])
        weights.append(np.load(tmp_path / f"{processes}.npy"))
    assert np.array_equal(weights[0].view(np.uint32), weights[1].view(np.uint32))
    assert len(losses[0]) == 3 and losses[1] == losses[2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2 * 7 * 2.0**-24, atol=0)


def test_a_killed_process_stops_the_other(tmp_path, cleanly):
    cleanly += start(2, tmp_path / "w.npy", steps=10**9)
    first, second = cleanly
    assert any(line.startswith("loss ") for line in second.stdout)  # It trains.
    second.kill()
    begin = time.monotonic()
    _, errors = first.communicate(timeout=120)
    assert first.returncode != 0 and time.monotonic() - begin < 120
    assert errors
