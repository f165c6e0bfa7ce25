"""What an import brings along: the parts that answer at once, or run where no torch is, load nothing heavy."""

import json

TORCH_AND_MLFLOW = ["torch", "modelopt", "mlflow"]
STEPS = {  # one after the other in one process, the lightest first
    "import layerbits.results.bootstrap": [*TORCH_AND_MLFLOW, "pandas", "scipy"],
    "import layerbits.candidates.candidate, layerbits.candidates.capability": TORCH_AND_MLFLOW,
    "import layerbits.tracking": TORCH_AND_MLFLOW,
    "import layerbits.importing": TORCH_AND_MLFLOW,
    "import layerbits.history": TORCH_AND_MLFLOW,
    "import numpy; from layerbits.schemes import solver, make, source, settings; "
    "solver.pareto(numpy.array([[1.0, 2.0]]), {'a': 4.25, 'b': 8.0}, [10], [8.0])": TORCH_AND_MLFLOW,
    "from layerbits.commands import grid, scheme, sensitivity": TORCH_AND_MLFLOW,  # what they refuse, they refuse soon
    "import layerbits.figures": [*TORCH_AND_MLFLOW, "matplotlib.pyplot"],
}
PROGRAM = """
import json, sys
for step, heavy in json.loads(sys.argv[1]).items():
    exec(step)
    print(json.dumps([step, sorted(set(heavy) & set(sys.modules))]))
"""


def test_light_parts_import_nothing_heavy(python):
    found = dict(json.loads(line) for line in python(PROGRAM, json.dumps(STEPS)))
    assert found == {step: [] for step in STEPS}
