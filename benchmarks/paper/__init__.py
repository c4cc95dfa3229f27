"""The paper's comparison, analyses and claims (Yadav et al. 2023) on real models, through this tool's own output files.

`python -m benchmarks.paper.run --quick`. The demo's encoder, fine-tuning and slices are used as they are.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
