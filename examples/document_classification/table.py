"""Train a table of document classifiers: ``--help`` explains."""

from fairseq_rkm.experiments.classification_table import main

if __name__ == "__main__":
    main()
