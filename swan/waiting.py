"""Settings by which threads of swan's commands spin only for a moment while they wait; imported before torch.

The OpenMP library of torch's wheels spins for about a millisecond by default. Beside one busy process on two cores that
makes a forward pass 1.6 times and decoding 2.7 times as long; a shorter wait costs nothing where the cores are free. It
reads its settings when it is loaded, so they are set here, and for the command line only: other programs set theirs.
"""

import os
import sys

from swan.interrupts import is_command

if is_command and "bench" not in sys.argv[1:2] and "OMP_WAIT_POLICY" not in os.environ:  # bench measures the default
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
