"""Scores a grid of quant pairs × granularities × dataset sizes; one parent run, a child per cell.

python experiments/grid.py 'quant_pairs="wfp8_afp8,wint8_aint8"' quant_granularities=default
"""

from layerbits.commands.grid import grid
from layerbits.entry import start

if __name__ == "__main__":
    start(grid, __file__, "grid")
