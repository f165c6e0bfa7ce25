"""Puts the same questions to the unquantized model and to each scheme, and logs what became of the answers.

python experiments/evaluate.py run_id=RUN_ID
python experiments/evaluate.py run_id=outputs/tmp/RUN tasks=cloze,sums limit=200 margin=0.02
"""

from layerbits.commands.evaluate import evaluate
from layerbits.entry import start

if __name__ == "__main__":
    start(evaluate, __file__, "evaluate")
