"""The sampling ratio of each data path."""

# Data path below the input of `sample` -> copies of each sample an epoch: 1 = all of it once, 0.25 = another quarter in
# each epoch, 2 = twice. `--ratios YAML` replaces the table. While it is empty, every path has ratio 1. As soon as it
# names one, every path must be named: no data gets into training without a decision.
SAMPLE_RATIO_BY_DATA_PATH: dict[str, float] = {}
