"""For tests on real daemons: HDFS and Spark as processes, on free ports, for the whole test session."""

from collections.abc import Iterator

import pytest

from jobs.cluster import Cluster, temporary_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """All daemons up. A test that stops one starts it again. Blocks of 8 MiB, so that files have several."""
    with temporary_cluster(tmp_path_factory.mktemp("cluster"), block_mib=8) as running:
        yield running
