"""Ray: the actors, the fleet, the driver."""

import os
import sys
from pathlib import Path

# In a worker process Ray puts the folder where the user stands before everything else, so that a file of his, random.py
# or rewards.py, would be taken for Python's or ours. It is the last to be looked into; rewards/registry.py needs it.
_here, _root = Path.cwd(), Path(__file__).resolve().parent.parent
if _here != _root:
    sys.path[:] = [path for path in sys.path if Path(path or os.curdir).absolute() != _here] + [str(_here)]
