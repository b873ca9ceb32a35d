"""fairseq-rkm: recurrent kernel machines as one PyTorch module and as a plugin for fairseq.

``from fairseq_rkm import RKM`` needs PyTorch alone:

>>> rnn = RKM(300, 512, num_layers=2)
>>> output, state = rnn(torch.randn(70, 20, 300))  # (T, B, m) -> (T, B, d)

The import changes nothing of fairseq. fairseq's ``--user-dir`` registers the package's models, tasks, criterions and
optimizers and changes fairseq as ``fairseq_patches`` lists. So do :func:`register` and all that load a trained model.
"""

import logging
import os
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


def _is_user_dir() -> bool:
    """Return whether fairseq imports this package for ``--user-dir``: it notes the folder before."""
    importer = getattr(sys.modules.get("fairseq.utils"), "import_user_module", None)
    folders = (folder for folder in getattr(importer, "memo", ()) if os.path.exists(folder))
    return any(os.path.samefile(folder, os.path.dirname(__file__)) for folder in folders)


if _is_user_dir():
    register()
