"""What people see of a run: a live line, metrics.jsonl, TensorBoard and other trackers."""

from trainer.metrics.record import ASIDE, METRICS, Metrics, StepMetrics, peak_memory_gb

__all__ = ["ASIDE", "METRICS", "Metrics", "StepMetrics", "peak_memory_gb"]
