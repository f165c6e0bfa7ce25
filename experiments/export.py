"""Exports schemes as checkpoints, proves each by reading it back, and logs and registers them.

python experiments/export.py run_id=RUN_ID
python experiments/export.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json kv_cache=fp8
"""

from layerbits.commands.export import export
from layerbits.entry import start

if __name__ == "__main__":
    start(export, __file__, "export")
