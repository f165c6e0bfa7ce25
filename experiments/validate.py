"""Measures what a run's scores predict, group by group on held-out rows, and logs how well they agree.

python experiments/validate.py run_id=RUN_ID
python experiments/validate.py run_id=outputs/tmp/RUN rankers=none disable_one=true
"""

from layerbits.commands.validate import validation
from layerbits.entry import start

if __name__ == "__main__":
    start(validation, __file__, "validate")
