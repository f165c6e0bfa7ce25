"""Scores the groups of one model under one quant pair at one granularity, and logs the run.

python experiments/sensitivity.py quant_pair=wint8_afp16 dataset.size=medium
python experiments/sensitivity.py recipe=general/auto_quantize/nvfp4_fp8_at_5p4bits
python experiments/sensitivity.py -m quant_pair=wfp8_afp8,wint8_afp16
python experiments/sensitivity.py report_only=outputs/tmp/RUN/manifest.json
"""

from layerbits.commands.sensitivity import sensitivity
from layerbits.entry import start

if __name__ == "__main__":
    start(sensitivity, __file__, "sensitivity")
