"""Atomic and durable writes, locks, tensors read whole, hashes of files and tensors, and the cache folder."""

from cakeflow.storage.atomic import (
    append_line,
    make_folder,
    make_private,
    pass_on_rights,
    truncate,
    unfinished,
    uninterrupted,
    write_tensors,
    write_text,
    write_whole,
)  # fmt: skip
from cakeflow.storage.cache import cache_folder, content_key, require_writable
from cakeflow.storage.folders import check_free, claim_folder, require_inside, write_folder
from cakeflow.storage.hashing import file_hash, tensor_hash, tensor_hashes
from cakeflow.storage.locks import locked
from cakeflow.storage.tensors import fault_in, read_tensors

__all__ = [
    "append_line", "cache_folder", "check_free", "claim_folder", "content_key", "fault_in", "file_hash", "locked",
    "make_folder", "make_private", "pass_on_rights", "read_tensors", "require_inside", "require_writable",
    "tensor_hash", "tensor_hashes", "truncate", "unfinished", "uninterrupted", "write_folder", "write_tensors",
    "write_text", "write_whole",
]  # fmt: skip
