"""The ``prefork`` pool: tasks run in child processes, forked from a clean server with the application preloaded."""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dray.core.contracts import Executor, Pool, PoolFeatures, Size
from dray.core.errors import ConfigError, DrayError
from dray.core.message import Delivery, Outcome, RunningTask, StoredResult
from dray.plugins._prefork_child import ChildLoop, Retirement
from dray.plugins._prefork_crew import TICK_S, Crew
from dray.plugins._prefork_link import Link
from dray.plugins._prefork_memory import SlotMemory, shared_memory
from dray.plugins._prefork_server import ForkServer

