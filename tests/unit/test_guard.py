"""The decoder's process: what kills it costs one image, if it was the image, and it outlives nobody."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.checks import RowError
from pipeline.images.guard import Decoder
from tests.support.image_zoo import HOSTILE


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def decoder(hostile: None) -> Iterator[Decoder]:
    made = Decoder(cpu_seconds=0.3)
    yield made
    made.close()


def picture(side: int = 64) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(data, "JPEG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("deed", "says"),
    [
        ("crash", "SIGSEGV"),
        ("abort", "SIGABRT"),
        ("spin", "takes over 0.3 s of CPU time"),
        ("sleep", "takes over 3 s"),
        ("memory", "MemoryError"),
    ],
)
def test_it_costs_the_image_alone(decoder: Decoder, deed: str, says: str) -> None:
    assert decoder.probe(picture(), "before").width == 64
    with pytest.raises(RowError, match=says) as caught:
        decoder.probe(b"HOSTILE" + deed.encode(), "bad.png")
    assert str(caught.value.reason) == "processor_failed"
    assert "'bad.png'" in caught.value.evidence
    assert decoder.thumbnail(b"HOSTILE" + deed.encode(), 32) is None
    assert decoder.probe(picture(), "after").width == 64


def test_an_image_that_only_was_there_is_not_blamed(decoder: Decoder) -> None:
    """The process is killed from outside, idle or while it decodes."""
    large = picture(1500)
    sound = decoder.probe(large, "a")
    for delay in (0.0, 0.002, 0.01):
        process = decoder._process
        assert process is not None
        timer = threading.Timer(delay, process.kill)
        timer.start()
        assert decoder.probe(large, "a") == sound
        timer.join()


def test_a_decoder_that_does_not_start_is_no_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the image decoder does not start: /bin/false -m pipeline"):
        Decoder().probe(picture(), "a")


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_it_ends_with_its_parent(hostile: None, state: str) -> None:
    """Also when that is killed -9, and the decoder is in an image that never ends."""
    deed = "decoder.probe(b'HOSTILEspin', 'a')" if state == "busy" else "time.sleep(100)"
    program = f"""
import time
from pipeline.images.guard import Decoder
decoder = Decoder(cpu_seconds=1.0)
decoder._running()
print(decoder._process.pid, flush=True)
{deed}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert state_of(child) in "SR"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    limit = time.monotonic() + 10
    while state_of(child) not in "XZ":
        assert time.monotonic() < limit, "the decoder outlives its parent"
        time.sleep(0.05)


def state_of(pid: int) -> str:
    """S sleeping, R running, Z dead and not waited for, X gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def test_signals_of_the_terminal_are_the_parents(decoder: Decoder) -> None:
    decoder.probe(picture(), "a")
    process = decoder._process
    assert process is not None
    os.kill(process.pid, signal.SIGINT)
    decoder.probe(picture(), "a")
    assert decoder._process is process
