"""Settings of every test, here and in the commands that tests start."""

import os

# Tiny tensors on several threads spend their time waiting for each other; it also fixes the order of float sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")
