"""Imported first, it keeps third parties' messages off the terminal: Gym's and the profiler's.

learn2learn imports Gym, which says at import that it is unmaintained; here it is only a dependency.
torch's profiler, which measures memory, writes a line at each start and stop, and an error where
there is no GPU.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, when torch is loaded
try:
    from gym_notices.notices import notices
except ImportError:  # no Gym, no message
    pass
else:
    notices.clear()
