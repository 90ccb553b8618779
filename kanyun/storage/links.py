"""Links to folders, met on a walk through a folder."""

from heapq import heappop, heappush

from kanyun.storage.folder import Folder


class Links:
    """Links that a walk through `root` has met and not followed yet. What they lead to is walked through once."""

    def __init__(self, root: Folder):
        self._root, self._walked = root, [_prefix(root)]
        self._waiting: list[tuple[str, str]] = []  # a heap of (prefix of the paths behind the link, its path)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, path: str) -> None:
        """`path`: of the link, below the root."""
        heappush(self._waiting, (_prefix(self._root / path), path))

    def take(self) -> str | None:
        """Return the path of the next link to follow; None if its target contains, or is in, what is walked already.

        A target comes before the ones it contains, so what is followed does not depend on the order of a listing.
        """
        target, path = heappop(self._waiting)
        if any(target.startswith(walked) or walked.startswith(target) for walked in self._walked):
            return None
        self._walked.append(target)
        return path


def _prefix(folder: Folder) -> str:
    return folder.resolved().uri.rstrip("/") + "/"
