"""How files of weights are written and read: past the page cache, in one pass, and checked piece by piece."""

import errno
import fcntl
import itertools
import os
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import xxhash

from convert.memory import is_finite
from convert.read_once import ReadOnce
from kanyun.errors import UserError
from trainer.checkpoint import DamagedError
from trainer.checkpoint.direct_file import DirectFile
from trainer.checkpoint.state import FileDigest


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 << 20, (5 << 20) + 17])
def test_a_file_past_the_page_cache_has_what_was_written(tmp_path: Path, size: int) -> None:
    """At its end, piece by piece; and at any place by several threads, in any order."""
    draw = random.Random(size)
    data = draw.randbytes(size)
    with DirectFile(str(tmp_path / "a")) as file:
        region, begin = file.region(), 0
        while begin < size:
            begin += region.write(data[begin : begin + draw.randint(1, 3 << 20)])
        region.close()
    assert (tmp_path / "a").read_bytes() == data

    cuts = sorted({0, size, *(draw.randint(0, size) for _ in range(40))})
    pieces = list(itertools.pairwise(cuts))
    draw.shuffle(pieces)

    def write(begin: int, end: int) -> None:
        region = file.region(begin)
        region.write(data[begin : (begin + end) // 2])
        region.write(data[(begin + end) // 2 : end])
        region.close()

    with DirectFile(str(tmp_path / "b"), size) as file, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: write(*piece), pieces))
    assert (tmp_path / "b").read_bytes() == data


def test_a_filesystem_that_refuses_direct_writes_gets_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As network filesystems do that open such a file all the same; and that lay nothing out beforehand."""
    pwrite = os.pwrite

    def only_through_the_cache(file: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(file, data, offset)

    def refuse(*arguments: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "pwrite", only_through_the_cache)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    data = random.Random(1).randbytes((5 << 20) + 17)
    with DirectFile(str(tmp_path / "a"), len(data)) as file:
        region = file.region()
        region.write(data)
        region.close()
    assert (tmp_path / "a").read_bytes() == data


def test_direct_writes_that_are_refused_to_several_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread goes on through the cache while the write of another is being refused."""
    pwrite, together = os.pwrite, threading.Barrier(2)

    def is_direct(file: int) -> int:
        return fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT

    def only_through_the_cache(file: int, data: memoryview, offset: int) -> int:
        if not is_direct(file):
            return pwrite(file, data, offset)
        if together.wait():
            while is_direct(file):
                time.sleep(0.001)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwrite", only_through_the_cache)
    data = random.Random(1).randbytes(2 << 20)

    def write(begin: int) -> None:
        region = file.region(begin)
        region.write(data[begin : begin + (1 << 20)])
        region.close()

    with DirectFile(str(tmp_path / "a")) as file, ThreadPoolExecutor(2) as pool:
        list(pool.map(write, (0, 1 << 20)))
    assert (tmp_path / "a").read_bytes() == data


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_errors_of_an_open_file_name_it(tmp_path: Path, size: int) -> None:
    """A file too large for its filesystem, whether it is laid out beforehand or not."""
    path, (soft, hard) = str(tmp_path / "a"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"), DirectFile(path, size) as file:
            region = file.region()
            region.write(bytes(1 << 20))
            region.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_digested_as_it_is_read_in_any_order(tmp_path: Path) -> None:
    data = random.Random(0).randbytes((3 << 20) + 5)
    (tmp_path / "a").write_bytes(data)
    digest = xxhash.xxh3_128_hexdigest(data)
    for pieces in ([(0, len(data))], [(7, 9), (9, 2 << 20)], [(2 << 20, 3 << 20), (5, 1 << 20)], []):
        file = ReadOnce(tmp_path / "a", FileDigest(len(data), digest))
        for begin, end in pieces:
            memory = torch.empty(end - begin, dtype=torch.uint8)
            file.read(begin, memory)
            assert memory.numpy().tobytes() == data[begin:end]
        file.check()
    wrong = ReadOnce(tmp_path / "a", FileDigest(len(data), "0" * 32))
    with pytest.raises(DamagedError, match=f"a is damaged .its digest is {digest}, recorded is 0000"):
        wrong.check()
    with pytest.raises(UserError, match="became shorter"):
        wrong.read(len(data), torch.empty(1, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    whole = torch.tensor([0.0, -0.0, largest, -largest, torch.finfo(dtype).tiny, -1.5], dtype=dtype)
    assert is_finite(whole)
    assert is_finite(whole[:0])
    for bad in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        for at in range(len(whole)):
            values = whole.clone()
            values[at] = bad
            assert not is_finite(values)
