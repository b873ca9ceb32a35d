"""``python -m fairseq_rkm`` prints the plugin's folder, for ``--user-dir "$(python -m fairseq_rkm)"``."""

from pathlib import Path

print(Path(__file__).resolve().parent)
