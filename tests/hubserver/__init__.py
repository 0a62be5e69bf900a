"""A small Hub on 127.0.0.1 for tests: real bare git repositories behind the protocol that huggingface_hub speaks.

`repo.py` knows git, `faults.py` what goes wrong on purpose, `app.py` the protocol; `client.py` readies the real client.
"""

from tests.hubserver.app import HubServer
from tests.hubserver.faults import Fault
from tests.hubserver.repo import HubRepo

__all__ = ["Fault", "HubRepo", "HubServer"]
