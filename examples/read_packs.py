"""Read packs with pyarrow alone: python -m examples.read_packs OUT/work/packed/packed_length_256_0_epoch_0_v4"""

import json
import sys
from pathlib import Path

import pyarrow as pa

if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
    sys.exit(__doc__)
folder = Path(sys.argv[1])
manifest = json.loads((folder / "manifest.json").read_text())
assert manifest["format_version"] == 4
print(f"{manifest['packs']} packs of {manifest['length']} tokens, {manifest['fill']:.0%} of them useful")

for shard in manifest["shards"]:
    with pa.memory_map(str(folder / shard["name"])) as file:
        batches = pa.ipc.open_file(file)
        for number in range(batches.num_record_batches):
            for pack in batches.get_batch(number).to_pylist():
                images = iter(zip(pack["images"], pack["image_grid_thw"], strict=True))
                print(f"pack {pack['pack_id']}: {len(pack['images'])} images")
                # A segment is a sample: the tokens between two entries of cu_seqlens. What is left over is padding.
                for index, name in enumerate(pack["dataset"]):
                    start, end = pack["cu_seqlens"][index : index + 2]
                    ids, trained = pack["input_ids"][start:end], pack["loss_mask"][start:end]
                    print(f"  {name}: {len(ids)} tokens, {sum(trained)} of them trained")
                    for _ in range(ids.count(manifest["image_token_id"]) > 0):
                        data, (_, rows, columns) = next(images)
                        print(f"    an image of {rows} x {columns} patches, {len(data)} bytes")
