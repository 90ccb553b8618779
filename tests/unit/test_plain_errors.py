"""Errors of tasks and of the storage as Spark hands them on: one sentence, the cause. Texts as they were seen."""

import pytest
from py4j.protocol import Py4JNetworkError
from pyspark.errors import PySparkException

from kanyun.errors import UserError
from pipeline.spark import plain_errors

JAVA = "\tat org.apache.hadoop.hdfs.server.namenode.FSNamesystem.newSafemodeException(FSNamesystem.java:1687)\n"
SAFE_MODE = "Cannot add block to /out/part-0.parquet. Name node is in safe mode."
QUOTA = "The DiskSpace quota of /out is exceeded: quota = 41943040 B = 40 MB but diskspace consumed = 256 MB"
SAID = "cannot read hdfs://host/raw/a.jsonl (Permission denied: user=somebody): see whether it is up"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            f"Caused by: org.apache.hadoop.ipc.RemoteException(a.b.SafeModeException): {SAFE_MODE}\nIt was ...",
            SAFE_MODE,
        ),
        (f"Caused by: org.apache.hadoop.hdfs.protocol.DSQuotaExceededException: {QUOTA}\n{JAVA}", QUOTA),
        (f"Traceback (most recent call last):\n  File ...\nkanyun.errors.UserError: {SAID}\n\n{JAVA}", SAID),
    ],
)
def test_the_cause_is_told_in_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as told, plain_errors():
        raise PySparkException(f"Job aborted.\n{JAVA}{text}")
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "Connection refused"), Py4JNetworkError("no answer")])
def test_a_jvm_that_was_killed(error: Exception) -> None:
    with pytest.raises(UserError, match=r"Spark's JVM has ended \(.*\), perhaps killed for its memory"), plain_errors():
        raise error


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(PySparkException), plain_errors():
        raise PySparkException(f"Job aborted.\n{JAVA}")
