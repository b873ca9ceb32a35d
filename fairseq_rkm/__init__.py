"""fairseq-rkm: recurrent kernel machines as one PyTorch module and as a plugin for fairseq.

``from fairseq_rkm import RKM`` needs PyTorch alone:

>>> rnn = RKM(300, 512, num_layers=2)
>>> output, state = rnn(torch.randn(70, 20, 300))  # (T, B, m) -> (T, B, d)

Within fairseq's commands (``--user-dir``) the import of this package registers its models, tasks, criterions and
optimizers. Elsewhere :func:`register` does.
"""

import logging
import sys

from fairseq_rkm.errors import RKMError
from fairseq_rkm.modules import RKM, RKMState
from fairseq_rkm.ops import CELLS

__version__ = "0.1.0"
__all__ = ["CELLS", "RKM", "RKMError", "RKMState", "register"]

# At its import fairseq says that tensorboardX is not installed. Nobody needs it here, and the line would stand among
# the results of fairseq_rkm.predict and of the hubs.
logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)


def register() -> None:
    """Register the plugin's components with fairseq, and change fairseq as :mod:`fairseq_rkm.fairseq_patches` lists.

    Raises:
        FairseqMissingError: fairseq is not installed.
    """
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
