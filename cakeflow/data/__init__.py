"""Requests from files and data sets, and the facts that ship with the package."""

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.fields import check_fields, missing_fields
from cakeflow.data.module import EditDataModule
from cakeflow.data.readers import read_requests
from cakeflow.data.selection import select

__all__ = ["EditDataModule", "builtin_facts", "check_fields", "missing_fields", "read_requests", "select"]
