"""Tabulate what experiments with several kernels left; ``--help`` explains."""

from fairseq_rkm.experiments.kernel_tables import main

if __name__ == "__main__":
    main()
