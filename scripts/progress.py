"""Show the progress of fairseq's training; ``--help`` explains."""

from fairseq_rkm.experiments.training_progress import main

if __name__ == "__main__":
    main()
