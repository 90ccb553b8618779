"""Which data goes into an epoch, and how much of it."""

# Data path below the input of `sample` -> copies of each sample an epoch: 1 = all of it once, 0.25 = another quarter in
# each epoch, 2 = twice. `--ratios YAML` replaces the table. While it is empty, every path has ratio 1. As soon as it
# names one, every path must be named: data that nobody decided about does not slip into training.
SAMPLE_RATIO_BY_DATA_PATH: dict[str, float] = {}
