"""Errors of a storage, as errors of one sentence: permanent (UserError), or transient, which are retried."""

import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from kanyun.errors import AccessDeniedError, InvalidPathError, UnavailableError, UserError
from kanyun.storage.waits import scaled

_PAUSES = tuple(
    map(scaled, (1, 3, 9, 20, 30))
)  # seconds between attempts: about a minute, in which a NameNode restarts
# Transient errors of a NameNode: it starts, or has not missed a dead DataNode yet (which takes it minutes).
_TRANSIENT = re.compile(
    "RetriableException|StandbyException|NotReplicatedYetException|Safe mode will be turned off automatically"
    "|could only be written to"
)
# Errors of hdfs-native in which neither the server nor the network has a part.
_PERMANENT = (
    "RPCError", "SASLError", "GSSAPIError", "NoSASLMechanism", "InvalidPath", "InvalidArgument", "UrlParseError"
)  # fmt: skip
_log = logging.getLogger(__name__)


def call_with_retry[T](action: Callable[[], T]) -> T:
    """Return `action()`, called up to six times while the storage is unavailable; then raise a plain UserError.

    Java's client waits for a NameNode and goes to another DataNode where one has died; hdfs-native 0.14 does neither:
    a refused connection is an error at once, and so is a block for which a dead DataNode was named. An action that
    writes must write the whole file anew.
    """
    for pause in _PAUSES:
        try:
            return action()
        except UnavailableError as error:
            _log.warning("%s; trying again in %.3g s", error, pause)
            time.sleep(pause)
    try:
        return action()
    except UnavailableError as error:
        raise UserError(str(error)) from error  # a caller that retries as well need not wait as long once more


def retrying[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """Decorate an idempotent method: transient errors are retried."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return call_with_retry(lambda: method(*args, **kwargs))

    return call


@contextmanager
def translate_errors(action: str, way_out: str) -> Iterator[None]:
    """Turn a driver's errors into UserErrors of one sentence; FileNotFoundError stays.

    Raises UnavailableError for transient errors, AccessDeniedError and InvalidPathError for what their names say.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if _is_transient(error):
            raise UnavailableError(f"{action} ({first_line(error)}): see whether all of it is up") from error
        raise _kind(error)(f"{action} ({first_line(error)}): {way_out}") from error


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may help. hdfs-native raises a plain OSError without a number for a connection, and a
    RuntimeError("RPCError... for an answer of the NameNode."""
    if isinstance(error, RuntimeError):
        return not str(error).startswith(_PERMANENT) or bool(_TRANSIENT.search(str(error)))
    return type(error) is OSError and error.errno is None and "failed to lookup address" not in str(error)


def _kind(error: Exception) -> type[UserError]:
    if isinstance(error, PermissionError) or "AccessControlException" in str(error):
        return AccessDeniedError
    if isinstance(error, ValueError) or str(error).startswith("InvalidPath"):
        return InvalidPathError
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return InvalidPathError
    return UserError


def first_line(error: Exception) -> str:
    """Return the message of RPCError("org.apache...SafeModeException", "Cannot create ...\\n\\tat org...") without its
    class and the Java stack."""
    text = re.sub(r'^\w+\(("[\w.$]+", )?"', "", str(error))
    return re.split(r'\\n|\n|"\)$', text)[0].replace('\\"', '"')
