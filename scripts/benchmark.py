"""Time recurrences and updates; ``--help`` explains."""

from fairseq_rkm.experiments.benchmark import main

if __name__ == "__main__":
    main()
