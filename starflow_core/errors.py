"""What the core raises. Every message names the thing that is wrong and the remedy."""


class StarflowError(Exception):
    """Base of all errors that a user's input or machine can cause."""


class CheckpointError(StarflowError):
    """A file that cannot be used as the model it was given for."""


class InputError(StarflowError, ValueError):
    """A value, picture, clip or prompt that a job cannot use."""


class NonFiniteError(StarflowError):
    """NaN or infinity in weights or latents; says where it was first seen."""


class OutOfMemoryForecast(StarflowError):
    """A job that would not fit the free memory, refused before it runs."""


class Cancelled(StarflowError):
    """The cancel check answered yes. Nothing was written."""
