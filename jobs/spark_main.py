"""What spark-submit starts on a cluster: the same as `python -m pipeline`."""

import runpy

runpy.run_module("pipeline", run_name="__main__")
