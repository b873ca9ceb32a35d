"""Tabulate runs; ``--help`` explains."""

from fairseq_rkm.experiments.report import main

if __name__ == "__main__":
    main()
