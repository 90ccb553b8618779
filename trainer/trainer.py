"""The training loop: what a run is made of, one step, held-out loss, going on after a stop."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Self

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from kanyun.errors import UserError
from kanyun.fingerprint import Fingerprint, check_vocabulary, fingerprint
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint import State
from trainer.config import TrainConfig
from trainer.data.batch import Batch, BatchFormat
from trainer.data.shapes import static_shape
from trainer.data.source import PackedData
from trainer.data.stream import PackStream, ValidationStream
from trainer.graph import Graphed
from trainer.metrics import Metrics, StepMetrics, peak_memory_gb
from trainer.models.config import ModelConfig
from trainer.models.costs import TRAINING
from trainer.models.initialize import build_model
from trainer.models.registry import costs_of
from trainer.optim.optimizer import build_optimizer, learning_rate, set_rates, take_step
from trainer.planning.gpus import find_gpu
from trainer.planning.planner import Layout, LayoutPlanner
from trainer.runtime import Runtime

RUN = "run.json"  # in the output folder: the config; marks it as a run's
BAD_STEPS = 5  # so many gradients in a row that are not finite end the run


@dataclass(frozen=True)
class Run:
    """All that a run is made of, read and checked, before any process group or model."""

    config: TrainConfig
    output: Folder
    model: ModelConfig
    data: PackedData
    validation: PackedData | None
    layout: Layout
    start: State  # step 0, or what the latest checkpoint says
    resume: Folder | None  # the latest checkpoint

    @classmethod
    def prepare(cls, config: TrainConfig, world: int, cuda: bool) -> Self:
        """Raises UserError for anything that does not fit together. Writes nothing; makes the output folder."""
        tokenizer = fingerprint(Folder(config.model))
        check_vocabulary(Folder(config.model))
        model = ModelConfig.from_hf(config.model)
        data = PackedData(config.data, config.length, tokenizer)
        validation = PackedData(config.validation, config.length, tokenizer) if config.validation else None
        output = _output(config.output)
        facts = {name: getattr(config, name) for name in ("length", "global_batch", "seed", "trainable")}
        start = State(0, 0, 0, tokenizer.digest, asdict(model), {"data digest": data.digest, **facts})
        resume = checkpoint.latest(output)
        if resume is not None:
            found = _state(resume, tokenizer)
            found.require(start, resume.uri)
            start = found
        elif config.init != "random":
            init = checkpoint.resolve(config.init)
            replace(_state(init, tokenizer), run={}).require(start, init.uri)
        planner = LayoutPlanner(model, find_gpu(torch.cuda.get_device_name()) if cuda else None, world)
        layout = planner.plan(length=config.length, global_batch=config.global_batch, patches=data.vision_budget)
        return cls(config, output, model, data, validation, layout, start, resume)


@dataclass(frozen=True)
class StepResult:
    """Of one step's global batch."""

    loss: float  # mean over its trained tokens
    trained_tokens: int
    flops: float
    grad_norm: float  # before clipping; not finite: the weights are unchanged


class Trainer:
    """Trains one run on this process's device. A context manager."""

    def __init__(self, run: Run, runtime: Runtime) -> None:
        config, layout = run.config, run.layout
        self.run, self.config, self.runtime = run, config, runtime
        self.step, self.skipped, self.bad_in_a_row = run.start.step, run.start.skipped, 0

        self.costs = costs_of(run.model)
        self._open = ExitStack()
        form = BatchFormat.of(run.model, pinned=runtime.cuda)
        self.static = static_shape(run.data.all, layout.micro_batch, form.geometry)
        place = {"micro_batch": layout.micro_batch, "rank": runtime.data_rank, "world": runtime.data_world}
        self.stream = self._open.enter_context(
            PackStream(
                run.data,
                replace(form, static=self.static) if runtime.cuda else form,
                seed=config.seed,
                global_batch=config.global_batch,
                cost=self.costs.pack_cost,
                **place,
            )
        )
        held_out = ValidationStream(run.validation, form, **place) if run.validation else None
        self.held_out = self._open.enter_context(held_out) if held_out else None
        self.steps = config.steps or self.stream.steps(config.epochs or 0)

        self.model = build_model(run.model, runtime, trainable=config.trainable, compute=layout.compute)
        if run.resume is None and config.init != "random":
            checkpoint.load(checkpoint.resolve(config.init), self.model)
        ddp_config = DistributedDataParallelConfig(
            # Not overlapped: gradients are reduced once a step, after many micro-batches of a replayed graph.
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
        )
        self.ddp = DistributedDataParallel(self.model.config, ddp_config, self.model)
        self.loss_sum, self.trained = self._zero(), self._zero()  # over this rank's micro-batches of a step
        self.graph = Graphed(self._forward_backward, runtime.device) if runtime.cuda else None
        if self.graph:
            from trainer.models.layers_te import accumulate_in_place

            self._open.callback(self.graph.close)
            accumulate_in_place(self.model)
        self.optimizer = build_optimizer(config, self.ddp, runtime)
        if run.resume is not None:
            checkpoint.load(run.resume, self.model, self.optimizer)
        manifests = [dataset.manifest for dataset in run.data.datasets]
        self.tokens_per_pack = sum(m.tokens for m in manifests) / sum(m.packs for m in manifests)  # useful ones
        known = runtime.cuda and config.trainable == "all"
        self.peak = find_gpu(torch.cuda.get_device_name()).flops if known else None
        self.metrics: Metrics | None = None

    def train(self) -> None:
        """To the last step. Raises UserError if gradients stay infinite, or the data is damaged."""
        self._say(self._introduction())
        if self.runtime.rank == 0:
            checkpoint.remove_leftovers(self.run.output)
        if self.step >= self.steps:
            return
        if self.runtime.rank == 0:
            self.run.output.write(RUN, (self.config.model_dump_json(indent=2) + "\n").encode())
            self.metrics = self._open.enter_context(Metrics(self.run.output, self.step, self.steps))
        batches = self.stream.batches(self.step * self.config.global_batch)
        while self.step < self.steps:
            started, waited = time.perf_counter(), self.stream.wait_seconds
            lr = learning_rate(self.config, self.step, self.steps)
            result = self.train_step(next(batches), lr)
            if self.step == self.run.start.step:
                age = time.time() - psutil.Process().create_time()
                self._say(f"first step done {age:.0f} s after this process was started")
            self.step += 1
            seconds, waited = time.perf_counter() - started, self.stream.wait_seconds - waited
            self._count_bad(result.grad_norm)
            held_out = self.held_out_loss() if self._due(self.config.validate_every) else None
            self._report(result, lr, seconds, waited, held_out)
            if self._due(self.config.save_every):
                self.save()

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step. Every rank returns the same.

        The gradient is that of the loss summed over all trained tokens of the global batch, divided by their number,
        however they are spread over ranks and micro-batches. A mean of means would weigh short answers more.
        """
        if self.graph and not self.graph.ready:
            self.graph.prepare(micro_batches[0], self.static.patches[-1])
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.loss_sum.zero_()
        self.trained.zero_()
        flops = 0
        for batch in micro_batches:
            if self.graph:
                self.graph(batch)
            else:
                self._forward_backward(batch)
            flops += TRAINING * self.costs.forward_flops(batch)
        # Reduces the gradients and `trained` over the ranks, and divides the ones by the other.
        finalize_model_grads([self.ddp], self.trained)
        set_rates(self.optimizer, self.config, lr)
        norm = take_step(self.optimizer, self.config.clip_grad)
        loss_sum, flops_sum = self._reduce(self.loss_sum, self._zero() + flops)
        tokens = self.trained.item()
        return StepResult(loss_sum / max(tokens, 1), round(tokens), flops_sum, norm)

    def _forward_backward(self, batch: Batch) -> None:
        """Add a micro-batch on the device to the gradients and sums. No host sync: it is captured in a CUDA graph."""
        loss = self.ddp(batch)
        loss.backward()
        self.loss_sum += loss.detach()
        self.trained += batch.loss_mask.sum()

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Mean over the trained tokens of all validation packs; None if there are none."""
        if self.held_out is None:
            return None
        total, tokens = self._zero(), self._zero()
        for batch in self.held_out.batches():
            batch = batch.to(self.runtime.device)
            total += self.model(batch)
            tokens += batch.loss_mask.sum()
        loss_sum, count = self._reduce(total, tokens)
        return loss_sum / max(count, 1)

    def save(self) -> None:
        state = replace(
            self.run.start, step=self.step, consumed=self.step * self.config.global_batch, skipped=self.skipped
        )
        hf = Folder(self.config.model)
        checkpoint.save(self.run.output, state, self.model, self.optimizer, hf, self.config.keep_last)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _report(self, result: StepResult, lr: float, seconds: float, waited: float, held_out: float | None) -> None:
        if self.metrics is None:  # only rank 0 has them
            return
        peak = self.peak * self.runtime.world * seconds if self.peak else None
        self.metrics.report(
            StepMetrics(
                step=self.step,
                loss=result.loss,
                lr=lr,
                grad_norm=result.grad_norm,
                skipped=self.skipped,
                trained_tokens=result.trained_tokens,
                tokens_per_second=self.config.global_batch * self.tokens_per_pack / seconds,
                mfu=result.flops / peak if peak else None,
                data_wait=waited / seconds,
                imbalance=self.stream.imbalance((self.step - 1) * self.config.global_batch),
                seconds=seconds,
                memory_gb=peak_memory_gb(self.runtime.device),
                validation_loss=held_out,
            )
        )

    def _count_bad(self, norm: float) -> None:
        """Every rank has the same norm, so all of them stop together."""
        good = math.isfinite(norm)
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        self.skipped += not good
        if self.bad_in_a_row == BAD_STEPS:
            raise UserError(
                f"the gradient was {norm} in {BAD_STEPS} steps in a row, up to step {self.step}: lower lr "
                f"{self.config.lr}, or look at the data; the same command goes on from the last checkpoint"
            )

    def _introduction(self) -> str:
        output, packs = self.run.output.path, sum(dataset.manifest.packs for dataset in self.run.data.datasets)
        if self.step >= self.steps:
            return f"{output} is finished: {self.step} steps; for more, set steps or epochs higher"
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.model.parameters())
        return "\n".join(
            [
                f"{trained:,} of {whole:,} parameters train on {packs:,} packs, {self.steps:,} steps",
                f"layout: {self.run.layout.reason}",
                f"going on from {self.run.resume.path}" if self.run.resume else f"starting at step 0 in {output}",
            ]
        )

    def _say(self, text: str) -> None:
        if self.runtime.rank == 0:
            print(text, flush=True)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.runtime.device)

    def _reduce(self, *values: Tensor) -> list[float]:
        """Sums over the data-parallel ranks."""
        sums = torch.stack(values).double()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        found: list[float] = sums.tolist()
        return found


def _state(step: Folder, tokenizer: Fingerprint) -> State:
    """Return a checkpoint's state; a digest that `tokenizer` had by a former algorithm is replaced by today's."""
    state = checkpoint.read_state(step)
    return replace(state, fingerprint=tokenizer.digest) if tokenizer.is_of(state.fingerprint, step / "hf") else state


def _output(path: str) -> Folder:
    """The output folder: a new or empty one, or a run's. Raises UserError if it holds something else."""
    output = Folder(path)
    if not output.uri.startswith("file:"):
        raise UserError(f"output {path} is not a local path: checkpoints are written to a local or a shared disk")
    found = [name for name in output.names() if not name.startswith(".")]
    if found and RUN not in found:
        raise UserError(f"{output.path} holds something else ({found[0]}): choose an empty or new output folder")
    output.make()
    return output
