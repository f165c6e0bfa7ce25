"""Measures the times of vLLM's linears on this card, which schemes by budget_ms are made from.

python experiments/costs.py run_id=RUN_ID
python experiments/costs.py run_id=RUN_ID batches=1,8 prefill=none tracking=none
"""

from layerbits.commands.costs import costs
from layerbits.entry import start

if __name__ == "__main__":
    start(costs, __file__, "costs")
