"""Measures schemes on held-out rows of a model, beside the noise floor, and logs the probe.

python experiments/probe.py run_id=RUN_ID
python experiments/probe.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json rows=16
"""

from layerbits.commands.probe import probe
from layerbits.entry import start

if __name__ == "__main__":
    start(probe, __file__, "probe")
