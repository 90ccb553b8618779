"""Packs of which none repeats what another has, for losses.py, made in a minute wherever Python has many packages.

Text: the sources and documentation in Python's own library and site-packages, every document once, documents end to end
in a random order, cut where a pack ends. Images: conversations as in vision_data.py's mix, about their pictures' random
crops, with different text in each. Tokenised with the tokenizer of DATA and written by kanyun's own writer; without
Spark, so that a machine with a GPU can do it.
"""

import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import xxhash
from tokenizers import Tokenizer

from benchmarks.vision_data import QUESTION, crop, pictures
from kanyun.fingerprint import Fingerprint, fingerprint
from kanyun.manifest import Counts
from kanyun.naming import dataset_name
from kanyun.schema import Sample
from kanyun.storage import Folder
from kanyun.vision import grid_thw, image_tokens
from kanyun.writer import ShardWriter, publish

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SHORTEST, LONGEST = 400, 16_000  # characters of a document
BATCH = 2_000  # documents that are tokenised at once
PATCHES = 14_000  # of a pack, at most
END, IMAGE, PAD = "<|endoftext|>", "<|image_pad|>", "<|endoftext|>"
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BEHIND = f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"

_texts = np.empty(0, np.int32)  # of the worker processes, which inherit it
_maker: Callable[[int], list[Sample]]


def documents(characters: int) -> list[str]:
    """Different documents, in a random but fixed order, until they have this many characters."""
    roots = [Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")]
    paths = [p for root in roots for p in root.rglob("*") if p.suffix in SUFFIXES]
    paths.sort(key=lambda p: xxhash.xxh3_64_intdigest(f"{p.parent.name}/{p.name}".encode()))
    seen, found, size = set(), [], 0
    for path in paths:
        text = path.read_text(errors="ignore") if path.is_file() else ""
        # A copy of a file, as packages ship them of each other, often differs in its head alone.
        digest = xxhash.xxh3_64_intdigest(text[len(text) // 2 :].encode())
        if SHORTEST <= len(text) <= LONGEST and digest not in seen:
            seen.add(digest)
            found.append(text)
            size += len(text)
            if size >= characters:
                break
    return found


def tokens(tokenizer: Any, count: int) -> list[np.ndarray]:
    """Documents as ids, each with END behind it, `count` tokens or more in all. Raises ValueError if there are less."""
    texts, ids, size = documents(6 * count), [], 0
    tokenizer.encode_special_tokens = True  # as the text they are there: transformers' sources have <|image_pad|>
    for first in range(0, len(texts), BATCH):
        for found in tokenizer.encode_batch_fast(texts[first : first + BATCH]):
            ids.append(np.array([*found.ids, tokenizer.token_to_id(END)], np.int32))
            size += len(ids[-1])
        if size >= count:
            tokenizer.encode_special_tokens = False
            return ids
    raise ValueError(f"Python's packages here have {size:,} tokens, of {count:,}: make fewer packs")


def text_packs(ids: Iterable[np.ndarray], length: int) -> Iterator[list[Sample]]:
    """Whole packs of documents end to end."""
    pack: list[Sample] = []
    free, number = length, 0
    for document in ids:
        while len(document):
            piece, document = document[:free], document[free:]
            pack.append(Sample(number, "text", 0, 0, piece, np.ones(len(piece), bool), [], []))
            free, number = free - len(piece), number + 1
            if not free:
                yield pack
                pack, free = [], length


class Conversations:
    """Makes pack number n from text [n * length, (n + 1) * length) and pictures drawn with n as the seed."""

    def __init__(self, tokenizer: Any, processor: dict[str, Any], length: int):
        self._length, self._processor, self._sources = length, processor, pictures()
        self._before, self._behind, self._end, self._start, self._stop = (
            np.array(tokenizer.encode(text).ids, np.int32)
            for text in (BEFORE, BEHIND, "<|im_end|>\n", "<|vision_start|>", "<|vision_end|>")
        )
        self._image = tokenizer.token_to_id(IMAGE)

    def __call__(self, number: int) -> list[Sample]:
        rng = np.random.default_rng(number)
        at, free, patches, pack = number * self._length, self._length, PATCHES, list[Sample]()
        while free > 200:
            grids, images = self._images(rng, free, patches) if len(pack) % 2 == 0 else ([], [])
            shown = [self._start, *self._slots(grids), self._stop] if grids else []
            head = np.concatenate([self._before, *shown, self._behind])
            room = free - len(head) - len(self._end)
            wanted = int(rng.integers(20, 1_200))
            count = room if room < wanted + 200 else wanted  # the last one fills the pack
            answer = np.concatenate([_texts[at : at + count], self._end])
            trained = np.arange(len(head) + len(answer)) >= len(head)
            ids = np.concatenate([head, answer])
            pack.append(Sample(number << 8 | len(pack), "mix", 0, 0, ids, trained, grids, images))
            at, free = at + count, free - len(ids)
            patches -= sum(int(np.prod(grid)) for grid in grids)
        return pack

    def _images(self, rng: np.random.Generator, free: int, patches: int) -> tuple[list[Any], list[bytes]]:
        """One to four pictures of 56 to 1,000 pixels a side, as many as leave room for an answer."""
        grids, images = list[Any](), list[bytes]()
        for _ in range(int(rng.integers(1, 5))):
            width, height = np.exp(rng.uniform(np.log(56), np.log(1000), 2)).astype(int).tolist()
            grid = grid_thw(width, height, self._processor)
            used = [*grids, grid]
            if sum(map(self._tokens, used)) + 400 > free or sum(int(np.prod(g)) for g in used) > patches:
                break
            grids, images = used, [*images, crop(self._sources, rng, width, height, "JPEG")]
        return grids, images

    def _tokens(self, grid: Sequence[int]) -> int:
        return image_tokens(grid, self._processor["merge_size"]) + 2

    def _slots(self, grids: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Each picture's slots, between those of its neighbours."""
        for number, grid in enumerate(grids):
            if number:
                yield np.concatenate([self._stop, self._start])
            yield np.full(self._tokens(grid) - 2, self._image, np.int32)


def write(folder: Folder, packs: Iterable[list[Sample]], length: int, model: Fingerprint, tokenizer: Any) -> int:
    """A packed dataset in `folder`. Returns its packs."""
    samples = patches = 0
    with ShardWriter(folder, 0, 1, length, tokenizer.token_to_id(PAD), ["text", "mix"]) as writer:
        for pack in packs:
            writer.add(pack)
            samples += len(pack)
            patches = max(patches, sum(int(np.prod(g)) for sample in pack for g in sample.image_grid_thw))
    assert writer.result is not None
    manifest = publish(
        folder,
        [writer.result],
        length=length,
        vision_budget=-(-patches // 64) * 64,
        part=0,
        epoch=0,
        seed=0,
        ratios={"mix" if patches else "text": "1"},
        counts=Counts(rows_in=samples, packed=samples),
        packs_lower_bound=1,
        tokenizer=model.digest,
        processor=model.processor,
        pad_token_id=tokenizer.token_to_id(PAD),
        image_token_id=tokenizer.token_to_id(IMAGE) if patches else None,
    )
    return manifest.packs


def make(model: Path, out: Path, packs: int, held_out: int, length: int) -> None:
    """OUT/train of `packs` packs and OUT/held_out of others; with pictures if `model` has a processor."""
    global _texts, _maker
    settings = fingerprint(Folder(str(model)))
    tokenizer: Any = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = tokens(tokenizer, (packs + held_out + 1) * length)
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        if settings.processor is None:
            made: Iterator[list[Sample]] = text_packs(ids, length)
        else:
            _texts, _maker = np.concatenate(ids), Conversations(tokenizer, dict(settings.processor), length)
            made = pool.map(_make, range(packs + held_out), chunksize=4)
        for name, count in (("held_out", held_out), ("train", packs)):
            folder = Folder(str(out / name)) / dataset_name(length, 0, 0)
            write(folder, (next(made) for _ in range(count)), length, settings, tokenizer)


def _make(number: int) -> list[Sample]:
    return _maker(number)
