"""The runs, tables and reports that ``examples/`` and ``scripts/`` are short doors to.

Each example is prepared, trained and tabulated by files that begin with its name: ``language_model_...``,
``translation_...``, ``classification_...``. The other files serve all of them: ``task_pool`` runs several trainings at
once, ``fairseq_command`` runs one of fairseq's commands, ``fairseq_log`` reads its log, ``circumstances`` says what a
figure must be read with, and ``report`` tabulates results of any kind.
"""
