from dataclasses import dataclass
from typing import Any


@dataclass
class PatcherInjection:
    inject: Any
    eject: Any


class WrappersMP:
    APPLY_MODEL = "apply_model"


class WrapperExecutor:
    """Calls the first of several wrappers, which call the next by it, and in the end what they are around."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    @classmethod
    def new_class_executor(cls, original, class_obj, wrappers):
        return cls(original, class_obj, list(wrappers))

    def execute(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](type(self)(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)

    __call__ = execute
