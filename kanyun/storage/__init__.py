"""One interface over local disk and hdfs://: `Folder`."""

from kanyun.storage.folder import Folder

__all__ = ["Folder"]
