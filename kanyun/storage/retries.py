"""What a storage refuses, as errors of one sentence: for good (UserError), or for now (and then it is asked again)."""

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from kanyun.errors import UserError
from kanyun.storage.waits import scaled

_PAUSES = tuple(map(scaled, (1, 3, 9, 20, 30)))  # seconds between attempts
# What a NameNode refuses only for a while: it starts, or has not missed a dead DataNode yet (which takes it minutes).
_FOR_A_WHILE = re.compile(
    "RetriableException|StandbyException|NotReplicatedYetException|Safe mode will be turned off automatically"
    "|could only be written to"
)
# Of hdfs-native's errors, those of which the server or the network is no part.
_OURS = ("RPCError", "SASLError", "GSSAPIError", "NoSASLMechanism", "InvalidPath", "InvalidArgument", "UrlParseError")
_log = logging.getLogger(__name__)


class UnavailableError(UserError):
    """The storage could not do it now; later it may."""


def retried[T](action: Callable[[], T]) -> T:
    """`action()`, again after each of _PAUSES if the storage is unavailable; then it is a plain UserError.

    Java's client waits for a NameNode and asks for another DataNode where one has died; hdfs-native 0.14 does neither:
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
        raise UserError(str(error)) from error  # whoever called in a `retried` action need not wait again


def patient[**P, T](method: Callable[P, T]) -> Callable[P, T]:
    """A method that does the same when called again, `retried`."""

    @wraps(method)
    def again(*args: P.args, **kwargs: P.kwargs) -> T:
        return retried(lambda: method(*args, **kwargs))

    return again


def asked[**P, T](call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`call`, of a storage's driver, `retried`; errors that are not for a while only stay as the driver raised them."""

    def once() -> T:
        try:
            return call(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            if _momentary(error):
                raise UnavailableError(
                    f"the storage does not answer ({first_line(error)}): see whether it is up"
                ) from error
            raise

    return retried(once)


@contextmanager
def refused(what: str, way_out: str) -> Iterator[None]:
    """Errors of the storage as a UserError of one sentence."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if _momentary(error):
            raise UnavailableError(f"{what} ({first_line(error)}): see whether all of it is up") from error
        raise UserError(f"{what} ({first_line(error)}): {way_out}") from error


def _momentary(error: Exception) -> bool:
    """hdfs-native: a plain OSError without a number is of a connection, RuntimeError("RPCError... of the NameNode."""
    if isinstance(error, RuntimeError):
        return not str(error).startswith(_OURS) or bool(_FOR_A_WHILE.search(str(error)))
    return type(error) is OSError and error.errno is None and "failed to lookup address" not in str(error)


def first_line(error: Exception) -> str:
    """What RPCError("org.apache...SafeModeException", "Cannot create ...\\n\\tat org...") says, no Java stack."""
    text = re.sub(r'^\w+\(("[\w.$]+", )?"', "", str(error))
    return re.split(r'\\n|\n|"\)$', text)[0].replace('\\"', '"')
