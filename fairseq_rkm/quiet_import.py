"""Import fairseq, and leave a program's logging as it was: one of fairseq's models sets the root logger to DEBUG."""

import importlib
import logging
import sys

from fairseq_rkm.errors import FairseqMissingError

if "fairseq" not in sys.modules:
    _root = logging.getLogger()
    _before = _root.level, list(_root.handlers)
    try:
        importlib.import_module("fairseq")
    except ModuleNotFoundError as error:
        if error.name != "fairseq":
            raise
        raise FairseqMissingError from None
    _root.setLevel(_before[0])
    _root.handlers[:] = _before[1]
