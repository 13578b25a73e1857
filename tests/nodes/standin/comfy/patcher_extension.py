from dataclasses import dataclass
from typing import Any


@dataclass
class PatcherInjection:
    inject: Any
    eject: Any
