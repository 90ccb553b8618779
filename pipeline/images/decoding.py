"""The decoder's process: encoded images go in by a pipe, their sizes and hashes come out. images/guard.py starts it.

Images come from anywhere, and decoders are C libraries: one that crashes, hangs or takes all memory ends this process
and not its parent. It imports Pillow and the checks alone, and so starts in 0.2 s.
"""

import io
import json
import re
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.checks import MAX_PIXELS, On, Reason, RowError, run_checks

REQUEST = struct.Struct("<II")  # bytes of the encoded image that follows; side of the thumbnail, 0 = probe
REPLY = struct.Struct("<I")  # bytes that follow: a thumbnail, or of JSON the arguments of guard.Decoded or a RowError
MEMORY_BYTES = (
    4 << 30
)  # of this process: the largest image takes 0.4 GB as RGBA, a decoder and a conversion as much each
WALL_SECONDS = 10  # a second of the limit in CPU time: for a decoder that waits and does not compute
# What Pillow raises for bytes that are no image, or a truncated or damaged one.
_DAMAGED = (OSError, SyntaxError, EOFError, struct.error, zlib.error)
_NOT_DECODED = {"EPS"}  # a program for Ghostscript, which Pillow would start


def probe(data: bytes) -> dict[str, Any]:
    """Return `width` and `height` as transformers' load_image gives them, and `image_hash`, see `_image_hash`.

    Everything that load_image does is done here once, so that no image fails in training: the header is read, sizes
    are checked, and only then pixels are decoded. Raises RowError.
    """
    with _pillow():
        try:
            image = _open(data)
            run_checks(On.IMAGE, *image.size)
            image.load()
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            # Pillow names twice the limit where an image is over that.
            evidence = re.sub(r"limit of .*", f"limit of {MAX_PIXELS} pixels", str(error))
            raise RowError(Reason.IMAGE_TOO_LARGE, evidence) from error
        except RowError:
            raise
        except UnidentifiedImageError as error:  # whose text has an address of memory, another one in each run
            raise RowError(Reason.IMAGE_UNREADABLE, f"{len(data)} bytes that are no image of a known format") from error
        except _DAMAGED as error:
            raise RowError(Reason.IMAGE_UNREADABLE, f"{len(data)} bytes: {error}") from error
        except Exception as error:
            raise RowError(Reason.PROCESSOR_FAILED, f"{type(error).__name__}: {error}") from error
        try:
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode != "RGB":
                image = image.convert("RGB")
            image_hash = _image_hash(image)
        except Exception as error:
            raise RowError(Reason.PROCESSOR_FAILED, f"{type(error).__name__}: {error}") from error
        run_checks(On.IMAGE, *image.size)  # some formats tell their size late
        return {"width": image.width, "height": image.height, "image_hash": image_hash}


def thumbnail(data: bytes, side: int) -> bytes:
    """Return a JPEG of at most side x side pixels; empty if the image cannot be decoded."""
    with _pillow(), suppress(Exception):
        image = _open(data)
        image.thumbnail((side, side))
        ImageOps.exif_transpose(image, in_place=True)
        encoded = io.BytesIO()
        image.convert("RGB").save(encoded, "JPEG", quality=80)
        return encoded.getvalue()
    return b""


@contextmanager
def _pillow() -> Iterator[None]:
    """Silence Pillow's warnings, and raise those of decompression bombs as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS
        yield


def _open(data: bytes) -> Image.Image:
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in Image.ID if name not in _NOT_DECODED])


def _image_hash(image: Image.Image) -> int:
    """Return a 64-bit dHash as a signed integer: whether each of 8 x 8 fields is darker than its right neighbour.

    16 x 16 pixels of each field are sampled: 0.08 ms, where all pixels of a photograph would cost a tenth of decoding.
    """
    fields = image.resize((9 * 16, 8 * 16), Image.Resampling.NEAREST).convert("L").resize((9, 8), Image.Resampling.BOX)
    grey = fields.tobytes()
    bits = "".join("1" if grey[n] < grey[n + 1] else "0" for n in range(72) if n % 9 < 8)
    value = int(bits, 2)
    return value - (value >> 63 << 64)


def main(cpu_seconds: float) -> None:
    """Answer requests until the pipe is closed, which the kernel does when the parent ends in whatever way."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    Path("/proc/self/oom_score_adj").write_text("1000")  # where the kernel must kill for memory, it kills this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    replies.write(REPLY.pack(0))
    replies.flush()
    while header := requests.read(REQUEST.size):
        size, side = REQUEST.unpack(header)
        data = requests.read(size)
        # By default these two signals end a process, wherever it is: no Python code has to run for it.
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, cpu_seconds * WALL_SECONDS)
        reply = thumbnail(data, side) if side else _probed(data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(REPLY.pack(len(reply)) + reply)
        replies.flush()


def _probed(data: bytes) -> bytes:
    try:
        answer = probe(data)
    except RowError as error:
        answer = {"reason": error.reason, "evidence": error.evidence}
    return json.dumps(answer).encode()


if __name__ == "__main__":
    main(float(sys.argv[1]))
