"""Python imports this at the start of each process of the server (``deploy/serve`` puts the folder on its path).

A search makes a thousand objects a run. With Python's defaults every fifty runs or so cause a garbage collection of all
that MLflow has imported, which is half of the time of a search; searches leave hardly any cycles to be collected.
"""

import gc

gc.set_threshold(50_000, 20, 50)
