"""The core's exceptions. Every message names what is wrong and how to fix it."""


class StarflowError(Exception):
    """Base class of all errors that a user's input or machine can cause."""


class CheckpointError(StarflowError):
    """A file that cannot be used as the model it was given for."""


class InputError(StarflowError, ValueError):
    """A value, picture, clip or prompt that a job cannot use."""


class NonFiniteError(StarflowError):
    """NaN or infinity in weights or latents; says where it was first seen."""


class OutOfMemoryForecast(StarflowError):
    """A job that would not fit into free memory, refused before it starts."""


class Cancelled(StarflowError):
    """The caller cancelled the job. Nothing was written."""


class JobsFailed(StarflowError):
    """Some of several jobs failed. The others are done."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that a device ran out of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text
