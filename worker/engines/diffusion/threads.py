"""How torch's threads wait for each other on the CPU: imported before torch, whose OpenMP reads it when loaded.

By default they spin, which is a little faster alone and a disaster beside any other busy process: the one that has
lost its core is waited for by the others at full speed. Measured on two cores beside other busy processes, a picture
of 20 steps with the bundled model: 1.4 to 51 s spinning, 2.0 to 2.7 s asleep.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
