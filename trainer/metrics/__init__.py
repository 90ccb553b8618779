"""What people see of a run: a live line, metrics.jsonl, TensorBoard and other trackers."""

from trainer.metrics.record import ASIDE, METRICS, Metrics, StepMetrics, peak_memory_gb
from trainer.metrics.step import RankTimes, StepResult, WorkClock, process_age

__all__ = [
    "ASIDE",
    "METRICS",
    "Metrics",
    "RankTimes",
    "StepMetrics",
    "StepResult",
    "WorkClock",
    "peak_memory_gb",
    "process_age",
]
