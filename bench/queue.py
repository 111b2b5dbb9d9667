"""Our queue beside others: jobs a second, pick-up by an idle worker, the way back, what an idle worker costs.

    python bench/queue.py [--quick] [--only NAME,…] [--jobs N]

See bench/queue_table.py.
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Whatever runs as a script here has this folder on its path, where this file hides the standard library's `queue`.
sys.path[:] = [str(FOLDER.parent), *(entry for entry in sys.path if Path(entry).resolve() != FOLDER)]
if __name__ == "queue":
    del sys.modules["queue"]
    import queue  # noqa: F401  # what the importer gets: the standard library's

if __name__ == "__main__":
    from bench.queue_table import main

    main()
