import subprocess
import sys

import numpy as np

from runtime.memory import peak_rss_bytes


def test_a_child_does_not_start_with_its_parents_maximum():
    before = peak_rss_bytes()
    assert np.ones(40_000_000).sum() == 40_000_000  # 320 MB
    assert peak_rss_bytes() > max(before, 320e6)
    code = "from runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert 1e6 < int(done.stdout) < 320e6
