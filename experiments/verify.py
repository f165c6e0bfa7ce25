"""Runs a past run again from its record, and logs whether its scores come out the same.

python experiments/verify.py run_id=RUN_ID
python experiments/verify.py run_id=outputs/tmp/RUN bound=1e-6
"""

from layerbits.commands.verify import verification
from layerbits.entry import start

if __name__ == "__main__":
    start(verification, __file__, "verify")
