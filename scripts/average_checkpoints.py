"""Average checkpoints; ``--help`` explains."""

from fairseq_rkm.experiments.checkpoint_averages import main

if __name__ == "__main__":
    main()
