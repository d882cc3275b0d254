"""The files of a synthetic root that are not PTB-XL's; loads nothing."""

from __future__ import annotations

REQUEST_FILE = ".generation.json"
"""What the root was made by, written first; its lock is the root's."""
MANIFEST_FILE = ".manifest.jsonl"
"""Every record to make, written once."""
SHARDS = ".shards"
"""Folder of the shards' locks and progress; gone when the root is finished."""
JOBS = ".submitit"
"""Folder of the launcher: submitit's logs and pickles, and which jobs it submitted."""
SUMS_FILE = "SHA256SUMS.txt"
"""Hashes of all files, written last: a root that has it is finished."""
