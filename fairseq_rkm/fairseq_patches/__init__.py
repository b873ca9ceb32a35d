"""All changes to fairseq, one subject a file. ``python -m fairseq_rkm.fairseq_patches`` lists them.

Each change is declared beside its code (:mod:`fairseq_rkm.fairseq_patches.registry`). The environment variable
``FAIRSEQ_RKM_PATCHES`` switches them: ``-late_readings`` leaves out a subject, ``-shutdown.leave_process_groups``
leaves out one change. A name without ``-`` selects its patches and no others.

    FAIRSEQ_RKM_PATCHES=-late_readings fairseq-train ...
"""

import importlib

SUBJECTS = (
    "console",
    "help",
    "torch_and_numpy",
    "configuration",
    "checkpoints",
    "file_names",
    "memory_bounds",
    "checkpoint_writing",
    "checkpoint_folders",
    "resuming",
    "processes",
    "data_parallel",
    "interruptions",
    "error_messages",
    "divergence",
    "precision",
    "late_readings",
    "shutdown",
    "translation",
    "translation_tasks",
    "documents",
    "data_files",
    "batches",
    "perplexity",
)
"""The files that declare patches, in the order in which the patches are made."""


def load() -> None:
    """Import the files that declare patches. This imports fairseq and leaves it unchanged."""
    import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq

    for subject in SUBJECTS:
        importlib.import_module(f"{__name__}.{subject}")


def apply() -> None:
    """Make the changes that ``FAIRSEQ_RKM_PATCHES`` selects, by default all. A second call changes nothing.

    Raises:
        RKMError: the variable names an unknown patch.
    """
    load()
    registry = importlib.import_module(f"{__name__}.registry")
    registry.apply()
