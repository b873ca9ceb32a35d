"""Train and score translation models: ``--help`` explains."""

from fairseq_rkm.experiments.translation_table import main

if __name__ == "__main__":
    main()
