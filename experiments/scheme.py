"""Makes schemes from the scores of sensitivity runs, and logs them; nothing is scored again.

python experiments/scheme.py run_id=RUN_ID
python experiments/scheme.py run_id=outputs/tmp/RUN schemes=none effective_bits=9,11,13
"""

from layerbits.commands.scheme import scheme
from layerbits.entry import start

if __name__ == "__main__":
    start(scheme, __file__, "schemes")
