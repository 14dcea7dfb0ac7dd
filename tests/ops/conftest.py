"""The kernels' own tests run in a process that test_triton_interpreted.py starts, and nowhere else."""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton_interpreted"]
