"""A local page to work on: facts are looked at, tried, applied, asked about and taken back by hand."""

from cakeflow.desk.server import DeskServer
from cakeflow.desk.session import Session
from cakeflow.desk.work import Worker

__all__ = ["DeskServer", "Session", "Worker"]
