"""Train a table of signal classifiers: ``--help`` explains."""

from fairseq_rkm.experiments.signal_table import main

if __name__ == "__main__":
    main()
