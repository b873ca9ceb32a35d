"""All changes to fairseq, a file a subject; ``python -m fairseq_rkm.fairseq_patches`` lists them.

Each is declared beside its code (:mod:`fairseq_rkm.fairseq_patches.registry`). ``FAIRSEQ_RKM_PATCHES`` switches them:
``-late_readings`` leaves a subject out, ``-shutdown.leave_process_groups`` one change, and names without ``-`` are made
alone.
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
    "resuming",
    "processes",
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
"""The files that declare patches, in the order in which these are made."""


def load() -> None:
    """Declare all patches; fairseq is imported, and not changed."""
    import fairseq_rkm.quiet_import  # noqa: F401  before anything that imports fairseq

    for subject in SUBJECTS:
        importlib.import_module(f"{__name__}.{subject}")


def apply() -> None:
    """Make the changes that ``FAIRSEQ_RKM_PATCHES`` selects, by default all; a second call changes nothing."""
    load()
    registry = importlib.import_module(f"{__name__}.registry")
    registry.apply()
