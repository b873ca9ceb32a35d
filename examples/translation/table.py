"""Train and score translation models: ``--help`` says how."""

from fairseq_rkm.experiments.translation_table import main

if __name__ == "__main__":
    main()
