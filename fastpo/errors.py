"""The errors a user can cause or meet; the command line shows their text without a traceback."""


class FastPOError(Exception):
    """Base of all errors that name what was wrong, what was expected and where.

    Attributes:
        exit_code: With which the command line ends.
        everywhere: Whether all processes of a launch raise it alike, so that only the first tells.
    """

    exit_code = 2
    everywhere = False


class ConfigError(FastPOError):
    """A configuration key is unknown, ill-typed or out of range."""


class DataError(FastPOError):
    """A data set, a file or a column is missing or does not hold what its schema says."""


class TooManyBadRowsError(DataError):
    """More rows of a data set are bad than `data.max_bad` allows.

    Attributes:
        rows: Place and reason of each.
    """

    def __init__(self, message: str, rows: list[tuple[str, str]]) -> None:
        super().__init__(message)
        self.rows = rows


class CacheError(FastPOError):
    """A prepared cache is missing, damaged, or was made from something else."""


class ModelError(FastPOError):
    """A model folder is missing a part or is of a kind that FastPO does not train."""


class NonFiniteLatentsError(ModelError):
    """The VAE answered with NaN or infinity.

    Attributes:
        rows: Which images of the batch it did so for.
    """

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


class CheckpointError(FastPOError):
    """A checkpoint is damaged or belongs to another configuration."""


class ForeignPathError(FastPOError):
    """What a command would replace or remove is not proven to be its own earlier work."""


class BusyFolderError(FastPOError):
    """Another process writes into the folder."""


class NoWholeCheckpointError(CheckpointError):
    """A run has checkpoints, but each is damaged."""

    everywhere = True


class NonFiniteLossError(FastPOError):
    """The loss became NaN or infinite; the last good checkpoint was kept."""


class NonFiniteWeightsError(FastPOError):
    """A weight or an average became NaN or infinite; it was not saved."""

    everywhere = True


class DifferingRunError(FastPOError):
    """A run that was trained again is not the run that it should be."""


class DifferingRanksError(FastPOError):
    """The processes of a run were started with different settings, data, models or versions."""

    everywhere = True


class LostProcessError(FastPOError):
    """A process of the run hangs, has ended, or has stopped with an error; the text names it."""

    exit_code = 76

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; go on from the last checkpoint with --resume")


def one_line(error: BaseException) -> str:
    """Returns an error's text in one line; of pydantic's many lines the first complaint."""
    try:
        from pydantic import ValidationError
    except ImportError:  # the kernels and losses need none
        return " ".join(str(error).split())
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return " ".join(str(error).split())


class MemoryShortageError(FastPOError):
    """Memory ran out while training, on a GPU or in the host; checkpoints are kept."""


class StorageError(FastPOError, OSError):
    """The system refused to write or read a file: disk full, read-only, too many files open, ...

    Attributes:
        errno: The system's number of the error, as in the module `errno`.
    """

    def __init__(self, message: str, number: int | None) -> None:
        super().__init__(message)
        self.errno = number
