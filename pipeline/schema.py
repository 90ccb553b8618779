"""The rows that go from stage to stage, as Arrow schemas. Image bytes are never in them, only refs."""

import pyarrow as pa

# Where an image's encoded bytes lie: a range of an immutable blob, copied there once by preprocess.
IMAGE_REF = pa.struct(
    [
        ("blob", pa.string()),  # absolute URI
        ("offset", pa.int64()),  # bytes
        ("size", pa.int64()),  # bytes
        ("width", pa.int32()),  # pixels, after EXIF rotation: as transformers sees it
        ("height", pa.int32()),
        ("digest", pa.int64()),  # of the encoded bytes: proves them when they are read, and tells equal images
        ("looks", pa.int64()),  # 64-bit dHash of the pixels: near duplicates differ in few bits
    ]
)

# {"type": "text", "text": ...} or {"type": "image", "text": null}; the n-th image part is images[n].
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.list_(PART)),  # null where the raw message has null beside its tool calls
        ("loss", pa.bool_()),  # false = an assistant message that is not trained; else null
        ("extra", pa.string()),  # JSON object of what else chat templates read (tool_calls ...); null = nothing
    ]
)

# Stage -> version of the rows it writes, where it is not 1. Part of a stage's settings: outputs of earlier versions are
# no finished work and no input. 2: sample_id is unique over the data paths; build's rows keep file and position;
# preprocess and filter keep tools, tool calls and loss flags.
VERSIONS = {"preprocess": 2, "filter": 2, "sample": 2, "build": 2}

# preprocess -> filter -> sample
SAMPLE = pa.schema(
    [
        # Hash of (dataset class, file, position), from `sample` on of the data path too. Spark has no u64: 63 bits.
        ("sample_id", pa.int64()),
        ("dataset", pa.string()),  # dataset class; from `sample` on the data path below its input, if a parent
        ("file", pa.string()),  # path relative to the raw folder
        ("position", pa.int64()),  # byte offset of the line (jsonl), row number (parquet) ... in the file
        ("messages", pa.list_(MESSAGE)),  # null for a text document
        ("tools", pa.string()),  # JSON list for the chat template; null = none
        ("text", pa.string()),  # null for a conversation
        ("images", pa.list_(IMAGE_REF)),
        ("content_hash", pa.binary(16)),  # of messages or text and of the images' bytes: equal rows are duplicates
        ("reason", pa.string()),  # null = clean; else a code of pipeline/checks.py
        ("evidence", pa.string()),  # what was seen, which value, which limit
        ("raw", pa.string()),  # the raw row as it came (inline image bytes replaced by their size)
    ]
)

# sample -> build: the same and which copy of the sample this is (0, 1, ... over all epochs)
SAMPLED = SAMPLE.append(pa.field("copy", pa.int32()))

# build -> pack
BUILT = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("position", pa.int64()),
        ("copy", pa.int32()),
        ("piece", pa.int32()),  # 0, 1, ... where a long text document was split
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),  # true = this token is a trained target
        ("image_grid_thw", pa.list_(pa.list_(pa.int32(), 3))),
        ("images", pa.list_(IMAGE_REF)),
        ("tokens", pa.int32()),  # len(input_ids)
        ("patches", pa.int32()),  # sum of t * h * w over the images
    ]
)

# every stage's quarantine/: a SAMPLE row, so nothing is lost; `reason` and `evidence` say why
QUARANTINE = SAMPLE
