"""How long to wait for something that may come back: a NameNode, a DataNode, the heartbeat of another process."""

import os

# One scale for all of these waits. Tests set it below 1: the daemons that they stop are back within seconds.
TIME_SCALE = float(os.environ.get("KANYUN_TIME_SCALE", "1"))


def scaled(seconds: float) -> float:
    """Return `seconds`, multiplied by the environment variable KANYUN_TIME_SCALE."""
    return seconds * TIME_SCALE
