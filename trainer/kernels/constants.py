"""Numbers that the kernels share with the planner and the loader. Imports nothing."""

IGNORED = -100  # a label that is not trained
ELSEWHERE = -1  # a label whose score another rank has
# Token slots whose logits exist at once, 2.5 GB of them. The head's weight gradient is read and written once a chunk:
# 0.4 ms for 0.5B's head, where the chunk takes 9 ms.
CHUNK = 8192
