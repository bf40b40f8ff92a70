"""Requests from files and data sets, and the facts that ship with the package."""

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.module import EditDataModule
from cakeflow.data.readers import read_requests

__all__ = ["EditDataModule", "builtin_facts", "read_requests"]
