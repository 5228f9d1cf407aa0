"""Ray: the actors, the fleet, the driver."""

import os
import sys
from pathlib import Path

# In a worker process Ray puts the user's folder first in sys.path. A file of his named random.py or rewards.py would be
# imported in the place of Python's or ours. So that folder goes last, where common/doors.py finds his own classes.
_here, _root = Path.cwd(), Path(__file__).resolve().parent.parent
if _here != _root:
    sys.path[:] = [path for path in sys.path if Path(path or os.curdir).absolute() != _here] + [str(_here)]
