"""A process with a low soft limit takes what the hard limit allows."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
from millrace.open_files import WANTED, raise_file_limit
raise_file_limit()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert soft == (WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)), (soft, hard)
"""


def test_the_soft_limit_is_raised() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
