"""How a run is laid out on the devices there are. The user states facts; this decides, and says why."""

from dataclasses import dataclass

from trainer.data.batch import BatchFormat
from trainer.data.images import PatchGeometry
from trainer.model import ModelConfig


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int  # processes that share one model
    micro_batch: int  # packs that go through the model at once
    form: BatchFormat
    reason: str  # one sentence for people


def decide(model: ModelConfig, world: int, cuda: bool) -> Layout:
    """Layout of `model` on `world` processes, one device each."""
    vision = model.vision
    geometry = PatchGeometry(vision.patch_size, vision.merge_size, vision.window_size) if vision else None
    form = BatchFormat(geometry, -1 if model.image_token_id is None else model.image_token_id, pinned=cuda)
    devices = f"{world} {'GPU(s)' if cuda else 'CPU process(es)'}"
    reason = f"the whole model on each of {devices}, packs dealt out to them, one at a time: it needs the least memory"
    return Layout(tensor_parallel=1, micro_batch=1, form=form, reason=reason)
