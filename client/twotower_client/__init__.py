"""Client of a served TwoTower model, and the `twotower` command line.

```python
from twotower_client import TwoTowerClient

with TwoTowerClient("localhost:8001") as client:
    print(client.generate("Mia the fox lived by the river.").text)
```
It needs numpy and tritonclient only. The client itself is loaded when it is first asked for, so
that `twotower --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from twotower_client.errors import (
    ClientError,
    DeadlineError,
    InactivityError,
    ModelNotReadyError,
    RequestCancelledError,
    RequestFailedError,
    RequestRefusedError,
    ServerBusyError,
    ServerUnavailableError,
)
from twotower_client.result import Answer, Block, Canvas, TokenDetail
from twotower_contract.options import Options

if TYPE_CHECKING:
    from twotower_client.aio import AsyncAnswerStream, AsyncTwoTowerClient
    from twotower_client.client import AnswerStream, TwoTowerClient
    from twotower_client.pool import AsyncClientPool, ClientPool
    from twotower_client.retry import Retry

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClientPool",
    "AsyncTwoTowerClient",
    "Block",
    "Canvas",
    "ClientError",
    "ClientPool",
    "DeadlineError",
    "InactivityError",
    "ModelNotReadyError",
    "Options",
    "RequestCancelledError",
    "RequestFailedError",
    "RequestRefusedError",
    "Retry",
    "ServerBusyError",
    "ServerUnavailableError",
    "TokenDetail",
    "TwoTowerClient",
]


LAZY = {
    "AsyncClientPool": "pool",
    "ClientPool": "pool",
    "Retry": "retry",
    "AnswerStream": "client",
    "AsyncAnswerStream": "aio",
    "AsyncTwoTowerClient": "aio",
    "TwoTowerClient": "client",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Show what is loaded on demand too, and nothing that this module imports for itself."""
    return __all__
