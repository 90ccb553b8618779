"""Images as they come from the web, good and bad, and image formats whose decoders do their worst."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

# Before anything else a Python runs `sitecustomize`: here it gives Pillow formats whose decoders do their worst.
HOSTILE = """
import ctypes, os, time
from PIL import Image, ImageFile

class Hostile(ImageFile.ImageFile):
    format = "HOSTILE"
    def _open(self):
        self._size, self._mode = (64, 64), "RGB"
        self.deed = self.fp.read()[7:]
    def load(self):
        match self.deed:
            case b"crash": ctypes.string_at(0)
            case b"abort": os.abort()
            case b"spin":
                while True: pass
            case b"sleep": time.sleep(1000)
            case b"memory": bytearray(5 << 30)
        return super().load()

Image.register_open("HOSTILE", Hostile, lambda prefix: prefix.startswith(b"HOSTILE"))
"""

WIDTH, HEIGHT = 90, 60


def picture(mode: str = "RGB", width: int = WIDTH, height: int = HEIGHT, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 4), np.uint8), "RGBA")
    image = coarse.resize((width, height), Image.Resampling.BILINEAR)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65_536, (height, width), np.uint16))
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def paletted() -> Image.Image:
    image = picture().quantize(16)
    image.info["transparency"] = 3
    return image


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def frames(kind: str) -> bytes:
    return encoded(picture(), kind, save_all=True, append_images=[picture(seed=1), picture(seed=2)], duration=10)


def upside_down_bmp() -> bytes:
    """A BMP with a negative height: its rows from the top down."""
    data = bytearray(encoded(picture(), "BMP"))
    data[22:26] = struct.pack("<i", -HEIGHT)
    return bytes(data)


def wide_jpeg() -> bytes:
    """A JPEG of 90 x 60 whose header claims 65,500 x 65,500."""
    data = bytearray(encoded(picture(), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def cyclic_tiff() -> bytes:
    """A TIFF whose directory names itself as the next one."""
    data = encoded(picture(), "TIFF")
    (first,) = struct.unpack("<I", data[4:8])
    (entries,) = struct.unpack("<H", data[first : first + 2])
    end = first + 2 + 12 * entries
    return data[:end] + struct.pack("<I", first) + data[end + 4 :]


def late_size_ico() -> bytes:
    """An ICO whose directory says 32 x 32 and whose picture is a PNG of 8 x 8."""
    inner = encoded(picture(width=8, height=8), "PNG")
    entry = struct.pack("<BBBBHHII", 32, 32, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 60\n%%EndComments\nshowpage\n%%EOF\n"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="90" height="60"/>'
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GIF_BOMB = b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0xF0, 0, 0) + bytes(6) + b","
GOOD: dict[str, bytes] = {
    "jpeg.jpg": encoded(picture(), "JPEG"),
    "progressive.jpg": encoded(picture(), "JPEG", progressive=True),
    "grey.jpg": encoded(picture("L"), "JPEG"),
    "cmyk.jpg": encoded(picture("CMYK"), "JPEG"),  # as Adobe has it: inverted, with its marker
    "turned.jpg": encoded(picture(), "JPEG", exif=oriented(6)),
    "turned.webp": encoded(picture(), "WEBP", exif=oriented(8)),
    "odd orientation.jpg": encoded(picture(), "JPEG", exif=oriented(77)),
    "exif junk.jpg": encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "profile.jpg": encoded(picture(), "JPEG", icc_profile=SRGB),
    "profile junk.png": encoded(picture(), "PNG", icc_profile=b"\xff" * 5000),
    "two pictures.mpo": encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)]),
    "16 bits.png": encoded(picture("I;16"), "PNG"),
    "16 bits RGB.png": png(40, 40, chunk(b"IDAT", zlib.compress(bytes([0, *range(240)]) * 40)), depth=16),
    "palette.png": encoded(picture().quantize(200), "PNG"),
    "palette, transparent.png": encoded(paletted(), "PNG"),
    "grey, transparent.png": encoded(picture("LA"), "PNG"),
    "transparent.png": encoded(picture("RGBA"), "PNG"),
    "black and white.png": encoded(picture("1"), "PNG"),
    "animated.png": frames("PNG"),
    "animated.gif": frames("GIF"),
    "animated.webp": frames("WEBP"),
    "lossless.webp": encoded(picture(), "WEBP", lossless=True),
    "avif.avif": encoded(picture(), "AVIF"),
    "jpeg 2000.jp2": encoded(picture(), "JPEG2000"),
    "plain.bmp": encoded(picture(), "BMP"),
    "upside down.bmp": upside_down_bmp(),
    "lzw.tif": encoded(picture(), "TIFF", compression="tiff_lzw"),
    "pages.tif": frames("TIFF"),
    "cycle.tif": cyclic_tiff(),
    "float.tif": encoded(picture("L").convert("F"), "TIFF"),
    "lab.tif": encoded(picture("LAB"), "TIFF"),
    "icon.ico": encoded(picture("RGBA", 64, 64), "ICO", sizes=[(16, 16), (64, 64)]),
    "netpbm.ppm": encoded(picture(), "PPM"),
    "targa.tga": encoded(picture(), "TGA"),
    "a png in truth.jpg": encoded(picture(), "PNG"),
    "a webp in truth.gif": encoded(picture(), "WEBP"),
    "at both limits.png": encoded(picture(width=28, height=5600), "PNG"),
}
BAD: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "image_unreadable"),
    "svg.png": (SVG, "image_unreadable"),
    "eps.jpg": (EPS, "image_unreadable"),
    "html.jpg": (b"<html>404 Not Found</html>", "image_unreadable"),
    "zeros.png": (bytes(10_000), "image_unreadable"),
    "half a header.png": (encoded(picture(), "PNG")[:20], "image_unreadable"),
    "no pixels.png": (png(64, 64), "image_unreadable"),
    "short pixels.png": (png(64, 64, chunk(b"IDAT", zlib.compress(bytes(100)))), "image_unreadable"),
    "wrong checksum.png": (encoded(picture(), "PNG").replace(b"IDAT", b"IDAU", 1), "image_unreadable"),
    "no size.png": (png(0, 0, chunk(b"IDAT", b"")), "image_unreadable"),
    "claims.jpg": (wide_jpeg(), "image_too_large"),
    "bomb.png": (png(20_000, 20_000, chunk(b"IDAT", zlib.compress(b""))), "image_too_large"),
    "bomb.gif": (GIF_BOMB + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x08\x00", "image_too_large"),
    "line.png": (encoded(picture(width=1, height=30_000), "PNG"), "image_too_small"),
    "strip.png": (encoded(picture(width=30, height=6_030), "PNG"), "image_aspect_ratio"),
    "late.ico": (late_size_ico(), "image_too_small"),
    "cut.webp": (encoded(picture(), "WEBP", lossless=True)[:-200], "image_unreadable"),
    "cut.avif": (encoded(picture(), "AVIF")[:-50], "image_unreadable"),
    "cut.jp2": (encoded(picture(), "JPEG2000")[:300], "image_unreadable"),
    "cut.tif": (encoded(picture(), "TIFF")[:5000], "image_unreadable"),
    "cut.bmp": (encoded(picture(), "BMP")[:5000], "image_unreadable"),
}


def wordy_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (2 << 20), zip=True)
    return encoded(picture(), "PNG", pnginfo=info)


BAD["wordy.png"] = (wordy_png(), "processor_failed")  # Pillow refuses it, and so transformers
