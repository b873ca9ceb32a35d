"""Try every precision and every --ddp-backend on two GPUs; ``--help`` explains."""

from fairseq_rkm.experiments.flag_combinations import main

if __name__ == "__main__":
    main()
