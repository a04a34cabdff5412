"""How many files a process may have open: each connection is one."""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

WANTED = 65536


def raise_file_limit() -> None:
    """Let this process, and those it starts, have as many open files as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError) as error:
            logger.warning("at most %d open files: %s", soft, error)
