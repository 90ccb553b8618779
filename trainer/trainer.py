"""The training loop: one step, held-out loss, saves, and when it ends."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from kanyun.errors import UserError
from kanyun.storage import Folder
from trainer import checkpoint
from trainer.checkpoint.saver import Saver
from trainer.data.batch import Batch, BatchFormat
from trainer.data.shapes import static_shape
from trainer.data.stream import PackStream, ValidationStream
from trainer.graph import Graphed
from trainer.metrics import Metrics, RankTimes, StepMetrics, StepResult, WorkClock, peak_memory_gb, process_age
from trainer.metrics.by_dataset import DatasetSums, Losses, told_apart
from trainer.models.costs import TRAINING
from trainer.models.initialize import build_model
from trainer.models.registry import costs_of
from trainer.optim.data_parallel import OverlappedDataParallel
from trainer.optim.optimizer import build_optimizer, learning_rate, set_rates, take_step
from trainer.planning.gpus import find_gpu
from trainer.run import RUN, Run
from trainer.runtime import Runtime
from trainer.stopping import BAD_STEPS, FiniteGuard, Watch

__all__ = ["BAD_STEPS", "Run", "StepResult", "Trainer"]


class Trainer:
    """Trains one run on this process's device. A context manager."""

    def __init__(
        self,
        run: Run,
        runtime: Runtime,
        *,
        stop: Callable[[], bool] = lambda: False,  # whether this rank was told to stop
        owns: Callable[[], bool] | None = None,  # whether the output is still this run's
    ) -> None:
        config, layout = run.config, run.layout
        self.config, self.runtime, self._stop, self._owns = config, runtime, stop, owns
        self.costs = costs_of(run.model)
        self._open = ExitStack()
        run.require_agreement()
        self.watch = Watch(runtime.rank, runtime.world_size, config.hang_after)
        self._open.callback(self.watch.close)
        names = told_apart(run.data, run.validation)
        batch_format = BatchFormat.of(run.model, pinned=runtime.cuda, datasets=names)
        self.static = static_shape(run.data.all, layout.micro_batch, batch_format.geometry)
        place = {"micro_batch": layout.micro_batch, "dp_rank": runtime.dp_rank, "dp_size": runtime.dp_size}
        self.stream = self._open.enter_context(
            PackStream(
                run.data,
                replace(batch_format, static=self.static) if runtime.cuda else batch_format,
                seed=config.seed,
                global_batch=config.global_batch,
                cost=self.costs.pack_cost,
                **place,
            )
        )
        held_out = ValidationStream(run.validation, batch_format, **place) if run.validation else None
        self.held_out = self._open.enter_context(held_out) if held_out else None
        self.clock = WorkClock(lambda: self.stream.wait_seconds, runtime.cuda)
        self.steps = config.steps or self.stream.steps(config.epochs or 0)

        self.model = build_model(run.model, runtime, trainable=config.trainable, compute=layout.compute)
        if self.model.offload:
            self._open.callback(self.model.offload.close)
        if run.weights is not None and not config.continue_from:
            run = run.load(self.model)
        self.ddp = OverlappedDataParallel(
            self.model.config,
            self.model,
            transposed_weights=layout.compute.transposed_weights,
        )
        self.guard = FiniteGuard(self.model.named_weights, config.lr)
        self.sums = DatasetSums(names, runtime.device)  # over this rank's micro-batches of a step
        self.graph = Graphed(self._forward_backward, runtime.device) if runtime.cuda else None
        if self.graph:
            from trainer.models.layers_te import accumulate_in_place

            self._open.callback(self.graph.close)
            accumulate_in_place(self.model)
        self.optimizer = build_optimizer(config, self.ddp, runtime)
        if run.resume is not None or config.continue_from:
            run = run.load(self.model, self.optimizer)
        self.run, self.step, self.skipped = run, run.start.step, run.start.skipped
        self.saver = Saver(
            run.output,
            Folder(config.model),
            keep_last=config.keep_last,
            local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            last=run.resume.name if run.resume else None,
            owns=owns,
        )
        self._open.callback(self.saver.close)
        manifests = [dataset.manifest for dataset in run.data.datasets]
        self.tokens_per_pack = sum(m.tokens for m in manifests) / sum(m.packs for m in manifests)  # useful ones
        gpu = find_gpu(torch.cuda.get_device_name()) if runtime.cuda and config.trainable == "all" else None
        self.peak = gpu.flops if gpu else None
        self.metrics: Metrics | None = None

    def train(self) -> bool:
        """Train to the last step. Return False if the run was told to stop before: it has saved.

        Raises UserError if gradients stay infinite, the data is damaged, or no checkpoint can be written.
        """
        self._say(self._introduction())
        if self.step >= self.steps:
            return True
        self._begin()
        batches, stop = self.stream.batches(self.step * self.config.global_batch), False
        while self.step < self.steps and not stop:
            started = time.perf_counter()
            self.clock.start()
            lr = learning_rate(self.config, self.step, self.steps)
            self.watch.begin(f"reading the data of step {self.step + 1}")
            result = self.train_step(next(batches), lr)
            if self.step == self.run.start.step:
                self._say(f"first step done {process_age():.0f} s after this process was started")
            self.step, stop = self.step + 1, result.stop
            seconds = time.perf_counter() - started
            skipped = self.guard.check_gradient(result.grad_norm, self.step)
            self.skipped += skipped
            held_out = self.held_out_loss() if self._due(self.config.validate_every) else None
            self._report(result, lr, seconds, held_out)
            if self.step == self.steps:
                self.guard.check_losses(result.loss, held_out.mean if held_out else None, self.step)
            if self._due(self.config.save_every) or stop:
                if skipped:
                    self.guard.check_weights(self.step)
                self.save()
        self.watch.begin("")
        self.saver.finish()
        if failed := self.saver.news():
            raise UserError(failed)
        if self.step < self.steps:
            self._say(f"told to stop: saved step {self.step} of {self.steps}; the same command goes on from there")
        return self.step >= self.steps

    def _begin(self) -> None:
        """Ready the output folder for the first step."""
        self.run.output.make()
        notes = []
        if self.runtime.rank == 0:  # before the room for saves is counted, which leftovers take
            checkpoint.require_writable(self.run.output)
            notes.append(checkpoint.set_aside(self.run.output, self.step))
        notes += self.saver.prepare(self.model, self.optimizer, self.runtime.device)
        if self.runtime.rank == 0:
            self.run.output.write(RUN, (self.config.model_dump_json(indent=2) + "\n").encode())
            ranks, config = self.runtime.dp_size, self.config.model_dump()
            metrics = Metrics(self.run.output, self.step, self.steps, ranks=ranks, config=config, owns=self._owns)
            self.metrics = self._open.enter_context(metrics)
            notes.append(self.metrics.notes)
        for note in filter(None, notes):
            self._say(note)

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Take one optimizer step. Every rank returns the same.

        The gradient is that of the loss summed over all trained tokens of the global batch, divided by their number,
        however they are spread over ranks and micro-batches. A mean of means would weigh short answers more.
        """
        if self.graph and not self.graph.ready:
            self.graph.prepare(micro_batches[0], self.static.patches[-1])
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.sums.clear()
        flops = 0
        self.clock.start()
        self.watch.begin(f"computing step {self.step + 1}")
        for batch in micro_batches:
            if self.graph:
                self.graph(batch)
            else:
                self._forward_backward(batch)
            flops += TRAINING * self.costs.forward_flops(batch)
        self.clock.stop()
        self.watch.begin(f"the exchange of gradients of step {self.step + 1}")
        # Reduces the gradients and the trained tokens over the ranks, and divides the ones by the other.
        finalize_model_grads([self.ddp], self.sums.trained())
        set_rates(self.optimizer, self.config, lr)
        norm = take_step(self.optimizer, self.config.clip_grad, self.ddp.sharded)
        own = self._zero() + flops, self._zero() + self._stop(), self.sums.values, self.clock.slots(self.runtime)
        flops_sum, stop, *totals = self._reduce(*own)
        if self.runtime.tensor_parallel > 1:  # each tensor-parallel rank has asked a different data-parallel group
            stops = self._zero() + stop
            dist.all_reduce(stops, group=parallel_state.get_tensor_model_parallel_group())
            stop = stops.item()
        losses, times = self.sums.losses(totals), RankTimes.of(totals[self.sums.values.numel() :])
        return StepResult(losses, flops_sum, norm, times, stop > 0)

    def _forward_backward(self, batch: Batch) -> None:
        """Add a micro-batch on the device to the gradients and sums. No host sync: it is captured in a CUDA graph."""
        self.ddp(batch, partial(self.sums.add, batch)).backward()

    @torch.no_grad()
    def held_out_loss(self) -> Losses | None:
        """Return the mean over the trained tokens of all validation packs; None if there are none."""
        if self.held_out is None:
            return None
        self.sums.clear()
        for number, batch in enumerate(self.held_out.batches()):
            self.watch.begin(f"held-out micro-batch {number} after step {self.step}")
            batch = batch.to(self.runtime.device)
            self.model(batch, partial(self.sums.add, batch))
        return self.sums.losses(self._reduce(self.sums.values))

    def save(self) -> None:
        """Copy what a checkpoint needs; it is written beside the next steps. Waits for the save before.

        Raises UserError after three failed saves in a row.
        """
        self.watch.begin("")  # a slow disk is no hang
        consumed, schedule = self.step * self.config.global_batch, self.run.schedule(self.steps)
        state = replace(self.run.start, step=self.step, consumed=consumed, skipped=self.skipped, schedule=schedule)
        self.ddp.wait_for_weights()
        self.saver.start(state, self.model, self.optimizer)
        if self.metrics is not None:
            self.metrics.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _report(self, result: StepResult, lr: float, seconds: float, held_out: Losses | None) -> None:
        if self.metrics is None:  # only rank 0 has them
            return
        failed, before = self.saver.news(), self.step - 1
        self.metrics.tell_saves(failed, self.saver.failures, self.saver.last)
        saves, stops = self._due(self.config.save_every) or result.stop, result.stop and self.step < self.steps
        events = {"start": before == self.run.start.step, "save failed": failed, "save": saves, "stop": stops}
        self.metrics.report(
            StepMetrics(
                step=self.step,
                steps=self.steps,
                **result.losses.figures(),
                lr=lr,
                grad_norm=result.grad_norm,
                skipped=self.skipped,
                tokens_per_second=self.config.global_batch * self.tokens_per_pack / seconds,
                mfu=result.flops / (self.peak * self.runtime.world_size * seconds) if self.peak else None,
                **result.ranks.figures(seconds),
                imbalance=self.stream.imbalance(before * self.config.global_batch),
                seconds=seconds,
                memory_gb=peak_memory_gb(self.runtime.device),
                validation_loss=held_out.mean if held_out else None,
                events=[name for name, is_so in events.items() if is_so],
                validation_loss_by_dataset=held_out.by_dataset if held_out else {},
            )
        )

    def _introduction(self) -> str:
        output = self.run.output.path
        if self.step >= self.steps:
            return f"{output} is finished: {self.step} steps; for more, set steps or epochs higher"
        packs = sum(dataset.manifest.packs for dataset in self.run.data.datasets)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"{trained:,} of {whole:,} parameters train on {packs:,} packs, {self.steps:,} steps",
            f"layout: {self.run.layout.reason}",
            *self.run.notes,
            f"going on from {self.run.resume.path}" if self.run.resume else f"starting at step 0 in {output}",
            self.run.schedule_change(self.steps),
        ]
        return "\n".join(line for line in lines if line)

    def _say(self, text: str) -> None:
        if self.runtime.rank == 0:
            with suppress(OSError):  # a log on a full disk ends no run
                print(text, flush=True)

    def _zero(self) -> Tensor:
        return torch.zeros((), dtype=torch.float32, device=self.runtime.device)

    def _reduce(self, *values: Tensor) -> list[float]:
        """Return sums over the data-parallel ranks."""
        sums = torch.cat([value.flatten() for value in values]).double()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        totals: list[float] = sums.tolist()
        return totals
