"""Atomic and durable writes, tensors read whole, hashes of files and tensors, and the cache folder."""

from cakeflow.storage.atomic import (
    append_line,
    check_free,
    make_private,
    pass_on_rights,
    truncate,
    uninterrupted,
    write_folder,
    write_tensors,
    write_text,
    write_whole,
)  # fmt: skip
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.hashing import file_hash, tensor_hash
from cakeflow.storage.tensors import read_tensors

__all__ = [
    "append_line", "cache_folder", "check_free", "content_key", "file_hash", "make_private", "pass_on_rights",
    "read_tensors", "require_writable", "tensor_hash", "truncate", "uninterrupted", "write_folder", "write_tensors",
    "write_text", "write_whole",
]  # fmt: skip
