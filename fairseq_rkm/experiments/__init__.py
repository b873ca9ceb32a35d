"""Runs, tables and reports; the scripts in ``examples/`` and ``scripts/`` are short entries to them.

Each example's files begin with its name: ``language_model_...``, ``translation_...``, ``classification_...``. They
prepare, train and tabulate. The other files serve all three: ``task_pool`` runs several trainings at once,
``fairseq_command`` runs one of fairseq's commands, ``fairseq_log`` reads its log, ``circumstances`` notes machine,
versions and commit, and ``report`` tabulates results of any kind.
"""
