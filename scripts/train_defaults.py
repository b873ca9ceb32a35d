"""Train every cell with its defaults; ``--help`` explains."""

from fairseq_rkm.experiments.default_training import main

if __name__ == "__main__":
    main()
