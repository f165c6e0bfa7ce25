"""Checks whether exported checkpoints are sound, and whether vLLM serves them as they were scored.

python experiments/serve_check.py run_id=RUN_ID
python experiments/serve_check.py checkpoint=outputs/export/FOLDER/fp8_autoquant_full tracking=none
"""

from layerbits.commands.serve_check import serve_check
from layerbits.entry import start

if __name__ == "__main__":
    start(serve_check, __file__, "serve_check")
