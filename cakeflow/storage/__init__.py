"""Files that appear whole, their hashes, and the cache folder."""

from cakeflow.storage.atomic import (
    append_line,
    check_free,
    cut,
    uninterrupted,
    write_folder,
    write_tensors,
    write_text,
    write_whole,
)
from cakeflow.storage.cache import cache_folder
from cakeflow.storage.hashing import digest, tensor_hash

__all__ = [
    "append_line",
    "cache_folder",
    "check_free",
    "cut",
    "digest",
    "tensor_hash",
    "uninterrupted",
    "write_folder",
    "write_tensors",
    "write_text",
    "write_whole",
]
