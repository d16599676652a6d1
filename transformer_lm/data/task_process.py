"""What the processes do first that the local executor starts for tasks, which are forks of one that imports this.

They say nothing themselves: datatrove's lines go to the files of its tasks, and an error comes back to the command,
whose it is, too, to handle Ctrl-C.
"""

import os
import signal
import sys

sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
signal.signal(signal.SIGINT, signal.SIG_IGN)
