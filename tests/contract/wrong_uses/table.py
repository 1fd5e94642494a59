"""The entries of the tables, and what happens when one is tried."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Wrong:
    """A mistake, and what must be told of it.

    Attributes:
        what: the exported name, or the command.
        mistake: in words.
        use: commits it.
        told: what the message must contain, above all the argument as the caller wrote it.
        by: the exception, ``Warning`` for one warning, or ``SystemExit`` for a command that says it on standard error.
        obscure: why the message is not what it should be, for the few that are left so.
    """

    what: str
    mistake: str
    use: Callable[[], object]
    told: tuple[str, ...]
    by: type[BaseException]
    obscure: str | None

    def __str__(self) -> str:
        # an address differs between the processes that share the tests
        return re.sub(r" object at 0x[0-9a-f]+", "", f"{self.what}: {self.mistake}")


@dataclass(frozen=True)
class Right:
    """A use near the wrong ones, which must neither raise nor warn."""

    what: str
    manner: str
    use: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.what}: {self.manner}"


def wrong(
    what: str,
    mistake: str,
    use: Callable[[], object],
    *told: str,
    by: type[BaseException] = ValueError,
    obscure: str | None = None,
) -> Wrong:
    """An entry of a table."""
    return Wrong(what, mistake, use, told, by, obscure)


def attempt(use: Callable[[], object]) -> tuple[BaseException | None, list[str], str]:
    """What a use raised, what it warned of, and what it wrote to standard error."""
    raised: BaseException | None = None
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stderr(io.StringIO()) as written,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("always")
        try:
            use()
        except (Exception, SystemExit) as error:
            raised = error
    return raised, [str(one.message) for one in caught], written.getvalue()


def fault(entry: Wrong) -> str | None:
    """Why what happens is not what should happen, or None: "silent", or what is obscure in it."""
    raised, warned, written = attempt(entry.use)
    if raised is None and not warned:
        return "silent"
    if entry.by is Warning:
        if raised is not None:
            return f"raised {type(raised).__name__} instead of a warning: {raised}"
        if len(warned) != 1:
            return f"warned {len(warned)} times: {warned}"
        message = warned[0]
    else:
        if type(raised) is not entry.by:
            return f"gave {type(raised).__name__} instead of {entry.by.__name__}: {raised or warned}"
        if isinstance(raised, SystemExit):
            if raised.code in (0, None):
                return "ended as if all was well"
            message = f"{written.rpartition('error: ')[2]}{raised}"
        else:
            message = str(raised)
        if entry.by is ValueError and not any(word in message for word in ("found", "has no option", "left out")):
            return f"does not say what was found: {message}"
    missing = [text for text in entry.told if text not in message]
    return f"does not tell {missing}: {message}" if missing else None
