"""Ask nestd nodes from Python (docs/client.md)."""

from nestd.client.aio import AsyncClient, connect_async
from nestd.client.connection import Client
from nestd.client.open import Broker, connect

__all__ = ["AsyncClient", "Broker", "Client", "connect", "connect_async"]
