"""The errors a user can cause. Everything else is a bug and keeps its traceback."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


class SpenseError(Exception):
    """A problem the user can act on; the command line prints its text and nothing else."""


class FormatError(SpenseError, ValueError):
    """A checkpoint, or its annotation, breaks the format of docs/format.md.

    Args:
        message: what is wrong, one sentence without the details below.
        file: the file it was found in.
        layer: the module or tensor name.
        key: the JSON key, dotted from the annotation's root.
        found: the offending value.
        expected: what the format asks for.

    It is a `ValueError` too, so that vLLM's configuration code reports it as a bad value.
    """

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        layer: str | None = None,
        key: str | None = None,
        found: object = None,
        expected: object = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.layer = layer
        self.key = key
        self.found = found
        self.expected = expected
        details = {
            "file": self.file,
            "layer": layer,
            "key": key,
            "found": found,
            "expected": expected,
        }
        said = "; ".join(f"{name}: {value}" for name, value in details.items() if value is not None)
        super().__init__(f"{message} ({said})" if said else message)

    def __reduce__(self) -> tuple[object, ...]:
        # vLLM passes errors between processes; keyword-only fields need their own way through.
        return _rebuild_format_error, (self.message, self._details())

    def _details(self) -> dict[str, object]:
        names = ("file", "layer", "key", "found", "expected")
        return {name: getattr(self, name) for name in names}

    def inside(self, file: object) -> FormatError:
        """The same error with the file filled in where it was not known yet."""
        return _rebuild_format_error(self.message, {**self._details(), "file": self.file or file})


def _rebuild_format_error(message: str, details: dict[str, object]) -> FormatError:
    return FormatError(message, **details)  # type: ignore[arg-type]
