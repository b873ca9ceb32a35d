"""fairseq-rkm: recurrent kernel machines as one PyTorch module and as a plugin for fairseq.

``from fairseq_rkm import RKM`` needs PyTorch alone. Inside fairseq's commands (``--user-dir``) importing the package
registers its models, tasks, criterions and optimizers; elsewhere :func:`register` does.
"""

import logging
import sys

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules import RKM, RKMState
from fairseq_rkm.ops import CELLS

__version__ = "0.1.0"
__all__ = ["CELLS", "RKM", "RKMError", "RKMState", "register"]

# fairseq says at its import that tensorboardX is not installed, which is no matter here: it would stand among what
# fairseq_rkm.predict and the hub print.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)


def register() -> None:
    """Make the plugin's components known to fairseq, and fairseq ready for the torch at hand."""
    import fairseq_rkm.quiet_import  # isort: skip
    import fairseq_rkm.criterions
    import fairseq_rkm.data.words_tokenizer
    import fairseq_rkm.fairseq_patches
    import fairseq_rkm.models
    import fairseq_rkm.optim
    import fairseq_rkm.tasks

    fairseq_rkm.fairseq_patches.apply()


if "fairseq" in sys.modules:
    register()
