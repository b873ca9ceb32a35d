"""Show how far fairseq's training is: ``--help`` says how."""

from fairseq_rkm.experiments.training_progress import main

if __name__ == "__main__":
    main()
