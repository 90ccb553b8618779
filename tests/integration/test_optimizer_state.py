"""Optimizer state that data-parallel ranks wrote, each its part, is read by ranks that split the model, and by one."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer

from kanyun.storage import Folder
from tests.support.model_golden import Example, batch_of
from tests.support.processes import run_ranks
from tests.support.qwen_assets import tiny_text_folder
from trainer import checkpoint
from trainer.checkpoint import State, saver
from trainer.checkpoint.model_parts import parts_of
from trainer.checkpoint.parts import Part
from trainer.checkpoint.reader import load
from trainer.checkpoint.saver import save
from trainer.config import TrainConfig
from trainer.models.config import ModelConfig
from trainer.models.initialize import build_model
from trainer.models.language import LanguageModel
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.optim.optimizer import build_optimizer, take_step
from trainer.optim.state import OptimizerState
from trainer.runtime import Runtime


def test_every_split_reads_what_another_wrote(tmp_path: Path) -> None:
    tiny_text_folder(tmp_path / "hf", tied=False)
    for action, processes in (("two data-parallel", 2), ("two tensor-parallel", 2), ("one", 1)):
        run_ranks(processes, "-m", "tests.integration.test_optimizer_state", str(tmp_path), action)
    written, rewritten, trained = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("written", "rewritten", "trained")
    )
    assert len({name for name in trained if ".exp_avg_sq." in name}) > 15
    for name, values in trained.items():
        assert torch.equal(written[name], rewritten[name]), name
        # Adam's first step moves a weight by the learning rate, whichever way a gradient near 0 is rounded.
        torch.testing.assert_close(written[name], values, rtol=1e-3, atol=2 * LR if ".param." in name else 1e-6)
        assert values.any(), name


LR = 1e-3


def test_a_cpu_takes_the_master_weights_of_a_gpu_not_its_rounded_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they share memory with the model, whose weights are in the checkpoint too, in bfloat16."""
    tiny_text_folder(tmp_path / "hf", tied=False)
    output = Folder(str(tmp_path / "out"))
    with Runtime.start(seed=7) as runtime:
        model, optimizer = one_step(tmp_path, runtime)
        state = State(1, 1, 0, "", {}, {})
        parts = [
            part if part.key.startswith("optimizer.") else rounded(part)
            for part in parts_of(model, optimizer, check=True)
        ]
        monkeypatch.setattr(saver, "parts_of", lambda *args, check: parts)
        step = save(output, state, model, optimizer, Folder(str(tmp_path / "hf")))
        masters = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.data.fill_(9)
        load(step, model, optimizer)
        for parameter, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(parameter, master)
            assert not torch.equal(master, master.bfloat16().float())


def rounded(part: Part) -> Part:
    """Round as a GPU writes a weight."""
    return replace(part, dtype=torch.bfloat16, sources=(part.sources[0].detach().bfloat16(),))


def work(folder: Path, action: str) -> None:
    tensor_parallel = 2 if action == "two tensor-parallel" else 1
    with Runtime.start(tensor_parallel=tensor_parallel, seed=7) as runtime:
        model, optimizer = one_step(folder, runtime)
        written, rewritten = Folder(str(folder / "written")), Folder(str(folder / "rewritten"))
        state = State(1, 1, 0, "", {}, {})
        if action == "two data-parallel":
            save(written, state, model, optimizer, Folder(str(folder / "hf")))
        elif action == "two tensor-parallel":
            load(checkpoint.resolve(written.path), model, optimizer)
            save(rewritten, state, model, optimizer, Folder(str(folder / "hf")))
        else:
            dump(folder / "trained.pt", model, optimizer)
            for found in (written, rewritten):
                for values in state_of(model, optimizer).values():
                    values.fill_(9)
                load(checkpoint.resolve(found.path), model, optimizer)
                dump(folder / f"{found.name}.pt", model, optimizer)


def one_step(folder: Path, runtime: Runtime) -> tuple[LanguageModel, ChainedOptimizer]:
    """A model whose moments are not 0, after the same two packs however many processes there are."""
    config = ModelConfig.from_hf(str(folder / "hf"))
    model = build_model(config, runtime)
    ddp = OverlappedDataParallel(model.config, model)
    assert len(ddp.bucket_groups) >= 4
    values = {"model": "", "data": "", "output": "", "length": 256, "global_batch": 2, "steps": 1, "lr": LR}
    optimizer = build_optimizer(TrainConfig.model_validate(values), ddp, runtime)
    trained = torch.zeros(())
    for seed in range(runtime.dp_rank, 2, runtime.dp_size):
        ids = torch.randint(0, config.vocab_size, (250,), generator=torch.Generator().manual_seed(seed))
        batch = batch_of(config, [[Example(ids[:150], ids[:150] > 9), Example(ids[150:], ids[150:] > 9)]], length=256)
        ddp(batch).backward()
        trained += batch.loss_mask.sum()
    finalize_model_grads([ddp], trained)
    take_step(optimizer, clip_grad=1.0)
    return model, optimizer


def state_of(model: LanguageModel, optimizer: ChainedOptimizer) -> dict[str, torch.Tensor]:
    weights = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    return {name: part.data for name, part in OptimizerState(optimizer, weights).to_load().items()}


def dump(file: Path, model: LanguageModel, optimizer: ChainedOptimizer) -> None:
    torch.save({name: values.clone() for name, values in state_of(model, optimizer).items()}, file)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
